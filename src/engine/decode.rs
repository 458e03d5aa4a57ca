//! Query and generated tokens, one pass for both: every host attends over its own keys and values, the partial
//! results of all hosts are gathered and merged by log-sum-exp, everywhere in the order of the hosts.
//!
//! Invariant: after a pass every rank has the same hidden state, bit for bit; how many ranks there are changes nothing, because
//! a host's part is computed alone and the parts are merged in their order.

use std::ops::Range;

use crate::backend::{AttentionTask, Backend, Mask, Segment};
use crate::comm::Comm;
use crate::generate::sampler::Choice;
use crate::plan::{PrefillPlan, QUERY_CHUNK};

use super::kv::{KeyValues, KvCache};
use super::rank::{Activations, Rank, RankError};

/// A prefilled context that tokens can be appended to.
pub(super) struct Decoder<'r, 'a, B: Backend, C> {
    rank: &'r Rank<'a, B, C>,
    plan: &'r PrefillPlan,
    cache: KvCache<B>,
    /// Row ranges of this rank's hosts in the cache.
    locals: Vec<Range<usize>>,
    hosts: Vec<usize>,
    /// Place of the first of them in the stack, which is in the order of the ranks.
    first_part: usize,
    /// Hosts of each rank.
    hosts_of: Vec<usize>,
    /// Tokens that have gone through since the prefill.
    stored: usize,
    activations: Activations<B>,
    /// Keys and values of the new rows where this rank does not keep them.
    unkept: KeyValues<B::Matrix>,
    /// The packed rows once for each of the rank's hosts, at the host's place in the stack.
    queries: B::Matrix,
    /// Partial results of all hosts, stacked; elsewhere while they are gathered.
    parts: Option<B::Matrix>,
    part_lse: B::Scores,
    last_row: usize,
}

impl<'r, 'a, B: Backend, C: Comm<B::Matrix, B::Scores>> Decoder<'r, 'a, B, C> {
    /// Takes over what prefill left.
    pub fn new(rank: &'r Rank<'a, B, C>, plan: &'r PrefillPlan, cache: KvCache<B>) -> Result<Self, RankError> {
        let (backend, shape, ranks) = (rank.backend, rank.shape(), rank.comm.size());
        let rows = plan.query.min(QUERY_CHUNK);
        let layout = plan.layout(rank.comm.rank(), ranks);
        let first = layout.local_rows().start;
        let stack = rows * plan.hosts.len();
        let hosts_of: Vec<usize> = (0..ranks).map(|rank| plan.hosts_of(rank, ranks).len()).collect();
        Ok(Self {
            rank,
            plan,
            cache,
            locals: layout.locals.iter().map(|rows| rows.start - first..rows.end - first).collect(),
            hosts: layout.hosts,
            first_part: hosts_of[..rank.comm.rank()].iter().sum(),
            hosts_of,
            stored: 0,
            activations: Activations::new(backend, rank.spec, rows)?,
            unkept: KeyValues::new(backend, shape, rows)?,
            queries: backend.matrix(stack, shape.qkv_width())?,
            parts: Some(backend.matrix(stack, shape.q_width())?),
            part_lse: backend.scores(stack, shape.heads)?,
            last_row: 0,
        })
    }

    /// Appends tokens, at the positions after all tokens so far.
    pub fn append(&mut self, tokens: &[u32]) -> Result<(), RankError> {
        for chunk in tokens.chunks(QUERY_CHUNK) {
            self.pass(chunk)?;
        }
        Ok(())
    }

    /// Logits of the last token that was appended.
    pub fn logits(&self) -> Result<Vec<f32>, RankError> {
        let (rank, x) = (self.rank, &self.activations.x);
        let head = rank.weights.language_model_head();
        Ok(rank.backend.logits(x, self.last_row, &rank.weights.final_norm, rank.spec.epsilon, head)?)
    }

    /// The token after the last one that was appended, if the device chooses; `None` also if its logits are not finite.
    pub fn choose(&self, choice: &Choice) -> Result<Option<u32>, RankError> {
        let (rank, x) = (self.rank, &self.activations.x);
        let head = rank.weights.language_model_head();
        let Choice { temperature, top_p, draw } = *choice;
        let (norm, epsilon) = (&rank.weights.final_norm, rank.spec.epsilon);
        Ok(rank.backend.choose_token(x, self.last_row, norm, epsilon, head, (temperature, top_p, draw))?)
    }

    fn pass(&mut self, tokens: &[u32]) -> Result<(), RankError> {
        let (rank, rows) = (self.rank, tokens.len());
        let first = self.plan.context + self.stored;
        let positions: Vec<u32> = (first..first + rows).map(|position| position as u32).collect();
        let tasks = self.tasks(rows);
        rank.backend.embed(&rank.weights.embedding, tokens, &mut self.activations.x)?;
        for (layer, weights) in rank.weights.layers.iter().enumerate() {
            self.activations.project(rank.backend, rank.spec, weights, rows)?;
            self.rope(layer, &positions)?;
            self.attend(layer, rows, &tasks)?;
            self.activations.close(rank.backend, rank.spec, weights, rows)?;
        }
        self.stored += rows;
        self.last_row = rows - 1;
        Ok(())
    }

    /// Rotates the new rows; the rank of the last host keeps their keys and values.
    fn rope(&mut self, layer: usize, positions: &[u32]) -> Result<(), RankError> {
        let (rank, rope) = (self.rank, &self.rank.spec.rope);
        let destination = match self.cache.tail {
            0 => self.unkept.at(0),
            _ => self.cache.layers[layer].at(self.cache.local + self.stored),
        };
        let (rows, qkv) = (0..positions.len(), &mut self.activations.qkv);
        rank.backend.rope_store(rank.shape(), rows, positions, &rope.inv_freq, rope.scale, qkv, destination)?;
        Ok(())
    }

    /// The new rows over each host of this rank; over themselves and their predecessors with the last one.
    fn tasks(&self, rows: usize) -> Vec<AttentionTask> {
        let segment = |rows, mask| Segment { source: 0, rows, mask };
        let task = |(index, local): (usize, &Range<usize>)| {
            let (host, part) = (self.hosts[index], self.first_part + index);
            let mut segments = vec![segment(local.clone(), Mask::Full)];
            if host + 1 == self.plan.hosts.len() {
                let tail = self.cache.local..self.cache.local + self.stored + rows;
                segments.push(segment(tail, Mask::Causal));
            }
            AttentionTask { queries: part * rows..(part + 1) * rows, segments }
        };
        self.locals.iter().enumerate().map(task).collect()
    }

    fn attend(&mut self, layer: usize, rows: usize, tasks: &[AttentionTask]) -> Result<(), RankError> {
        let (rank, backend, shape) = (self.rank, self.rank.backend, self.rank.shape());
        let hosts = self.plan.hosts.len();
        if hosts == 1 {
            // Nothing to stack, and nobody to gather from.
            let (q, sources) = (&self.activations.qkv, [self.cache.layers[layer].view()]);
            backend.attention(shape, q, &sources, tasks, &mut self.activations.attended, None)?;
            return Ok(());
        }
        let mut parts = self.parts.take().expect("in place between collectives");
        for task in tasks {
            backend.copy_rows(&self.activations.qkv, 0, rows, &mut self.queries, task.queries.start)?;
        }
        if !tasks.is_empty() {
            let sources = [self.cache.layers[layer].view()];
            backend.attention(shape, &self.queries, &sources, tasks, &mut parts, Some(&mut self.part_lse))?;
        }
        let counts: Vec<usize> = self.hosts_of.iter().map(|hosts| hosts * rows).collect();
        let gathering = rank.comm.all_gather(parts, &counts)?;
        rank.comm.all_gather_scores(&mut self.part_lse, &counts)?;
        let parts = self.parts.insert(rank.comm.finish(gathering)?);
        backend.merge_stacked(shape, rows, hosts, parts, &self.part_lse, &mut self.activations.attended)?;
        Ok(())
    }
}
