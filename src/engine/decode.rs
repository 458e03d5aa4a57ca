//! Query and generated tokens, of many sequences in one pass: every rank attends over its own keys and values, the partial results of
//! the ranks are gathered and merged by log-sum-exp, everywhere in the order of the ranks. Of the MLP, where most of the weights are, every rank takes a
//! part of the width, and what those give is gathered and added up in the same order; of the vocabulary too every rank takes a part.
//!
//! Invariant: after a pass every rank has the same hidden state, bit for bit; a row sees its own sequence alone.

use std::ops::Range;

use crate::backend::{AttentionTask, Backend, BackendError, KvMut, KvRef, Next, Wanted};
use crate::comm::{Comm, Partials};
use crate::model::weights::LayerWeights;
use crate::plan::pass_rows;

use super::kv::{KeyValues, KvCache};
use super::logits::Logits;
use super::rank::{Activations, Rank, RankError};

/// A prefilled context that tokens can be appended to; one rank's part of it.
pub(super) struct Sequence<B: Backend> {
    /// Tokens of the context.
    context: usize,
    cache: KvCache<B>,
    /// Tokens that have gone through since the prefill.
    stored: usize,
}

impl<B: Backend> Sequence<B> {
    /// Takes over what prefill left; `stored` tokens of the query have gone through with it.
    pub fn new(context: usize, stored: usize, cache: KvCache<B>) -> Self {
        Self { context, cache, stored }
    }

    /// Positions of the next `count` tokens.
    fn positions(&self, count: usize) -> Range<u32> {
        let first = self.context + self.stored;
        // A plan holds no more tokens than fit into 32 bits.
        first as u32..(first + count) as u32
    }

    fn task(&self, source: usize, queries: Range<usize>) -> AttentionTask {
        let segments = self.cache.segments(source, self.stored, queries.len());
        AttentionTask { queries, segments }
    }
}

/// A sequence in a pass, with the tokens that are appended to it.
pub(super) type Fed<'a, B> = (&'a mut Sequence<B>, &'a [u32]);

/// Buffers of a pass; they serve all sequences.
pub(super) struct Decoder<B: Backend> {
    activations: Activations<B>,
    /// Keys and values of new rows where this rank does not keep them.
    unkept: KeyValues<B::Matrix>,
    /// The last row of every sequence of the pass, `[rows, hidden]`.
    last: B::Matrix,
    logits: Logits<B>,
    stack: Option<Stack<B>>,
}

/// What several ranks need besides.
struct Stack<B: Backend> {
    /// The packed rows, at this rank's place in the stack.
    queries: B::Matrix,
    /// Partial results of all ranks.
    parts: B::Matrix,
    lse: B::Scores,
    /// All of them together.
    merged: B::Matrix,
    /// What every rank's part of the MLP gives, `[_, hidden]`.
    sums: B::Scores,
}

impl<B: Backend> Decoder<B> {
    /// Buffers for passes in which at most `at_once` sequences generate.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(rank: &Rank<'_, B, C>, at_once: usize) -> Result<Self, BackendError> {
        let rows = pass_rows(at_once);
        let (backend, shape, ranks) = (rank.backend, rank.shape(), rank.comm.size());
        let stacked = || {
            Ok::<_, BackendError>(Stack {
                queries: backend.matrix(rows * ranks, shape.qkv_width())?,
                parts: backend.matrix(rows * ranks, shape.q_width())?,
                lse: backend.scores(rows * ranks, shape.heads)?,
                merged: backend.matrix(rows, shape.q_width())?,
                sums: backend.scores(rows * ranks, rank.spec.hidden)?,
            })
        };
        Ok(Self {
            activations: Activations::new(backend, rank.spec, rows)?,
            unkept: KeyValues::new(backend, shape, rows)?,
            last: backend.matrix(rows, rank.spec.hidden)?,
            logits: Logits::new(rank, at_once)?,
            stack: if ranks > 1 { Some(stacked()?) } else { None },
        })
    }

    /// Takes the new tokens of all sequences through all layers.
    pub fn pass<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        fed: &mut [Fed<'_, B>],
    ) -> Result<(), RankError> {
        let tokens: Vec<u32> = fed.iter().flat_map(|(_, tokens)| tokens.iter().copied()).collect();
        let pass = Pass::new(fed);
        rank.backend.embed(&rank.weights.embedding, &tokens, &mut self.activations.x)?;
        for (layer, weights) in rank.weights.layers.iter().enumerate() {
            self.layer(rank, layer, weights, &pass, fed)?;
        }
        for (sequence, tokens) in fed.iter_mut() {
            sequence.stored += tokens.len();
        }
        self.keep_last_rows(rank.backend, &pass)
    }

    /// Logits of the first `rows` rows that were kept of the last pass, on every rank.
    pub fn give_logits<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        rows: usize,
    ) -> Result<(), RankError> {
        self.logits.give(rank, rows, &self.last)
    }

    /// For each row of the last logits, in their order, what is wanted of it.
    pub fn next(&self, backend: &B, wanted: &[Wanted]) -> Result<Vec<Next>, RankError> {
        self.logits.next(backend, wanted)
    }

    fn layer<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        weights: &LayerWeights<B>,
        pass: &Pass,
        fed: &mut [Fed<'_, B>],
    ) -> Result<(), RankError> {
        let (backend, rows) = (rank.backend, pass.positions.len());
        self.activations.project(backend, rank.spec, weights, rows)?;
        self.rope(rank, layer, pass, fed)?;
        let sources: Vec<_> = fed.iter().map(|(sequence, _)| sequence.cache.layers[layer].view()).collect();
        let Activations { qkv, attended, .. } = &mut self.activations;
        attend(&mut self.stack, rank, (qkv, attended, 0..rows), &sources, &pass.tasks)?;
        match &mut self.stack {
            Some(stack) => self.activations.close_together(rank, weights, rows, &mut stack.sums),
            None => Ok(self.activations.close(backend, rank.spec, weights, rows)?),
        }
    }

    /// Rotates the new rows; the rank of a sequence's last host keeps their keys and values.
    fn rope<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        pass: &Pass,
        fed: &mut [Fed<'_, B>],
    ) -> Result<(), RankError> {
        let (backend, shape, rope, qkv) = (rank.backend, rank.shape(), &rank.spec.rope, &mut self.activations.qkv);
        let (inv_freq, scale) = (&rope.inv_freq, rope.scale);
        let is_kept = fed.iter().all(|(sequence, _)| sequence.cache.tail > 0);
        if pass.is_single_tokens() && is_kept {
            let mut places: Vec<KvMut<'_, B::Matrix>> = Vec::with_capacity(fed.len());
            for (sequence, _) in fed.iter_mut() {
                places.push(sequence.cache.tail_at(layer, sequence.stored));
            }
            return Ok(backend.rope_store_each(shape, &pass.positions, inv_freq, scale, qkv, places)?);
        }
        for ((sequence, _), rows) in fed.iter_mut().zip(&pass.rows) {
            let place = match sequence.cache.tail {
                0 => self.unkept.at(rows.start),
                _ => sequence.cache.tail_at(layer, sequence.stored),
            };
            backend.rope_store(shape, rows.clone(), &pass.positions[rows.clone()], inv_freq, scale, qkv, place)?;
        }
        Ok(())
    }

    /// Attention of rows of somebody else's activations over what all ranks keep; tasks count their queries from the first of the rows.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        rows: Rows<'_, B::Matrix>,
        sources: &[KvRef<'_, B::Matrix>],
        tasks: &[AttentionTask],
    ) -> Result<(), RankError> {
        attend(&mut self.stack, rank, rows, sources, tasks)
    }

    /// The second half of the last layer for some rows of somebody else's activations, all of one sequence; what is left of the last of them is kept for
    /// [`Decoder::give_logits`].
    pub fn close_rows<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        from: &Activations<B>,
        rows: Range<usize>,
    ) -> Result<(), RankError> {
        let (backend, own) = (rank.backend, &mut self.activations);
        backend.copy_rows(&from.x, rows.start, rows.len(), &mut own.x, 0)?;
        backend.copy_rows(&from.attended, rows.start, rows.len(), &mut own.attended, 0)?;
        own.close(backend, rank.spec, &rank.weights.layers[layer], rows.len())?;
        Ok(backend.copy_rows(&own.x, rows.len() - 1, 1, &mut self.last, 0)?)
    }

    fn keep_last_rows(&mut self, backend: &B, pass: &Pass) -> Result<(), RankError> {
        if pass.is_single_tokens() {
            return Ok(backend.copy_rows(&self.activations.x, 0, pass.rows.len(), &mut self.last, 0)?);
        }
        for (index, rows) in pass.rows.iter().enumerate() {
            backend.copy_rows(&self.activations.x, rows.end - 1, 1, &mut self.last, index)?;
        }
        Ok(())
    }
}

/// Packed queries, where the result goes, and which rows of both.
pub(super) type Rows<'a, M> = (&'a M, &'a mut M, Range<usize>);

fn attend<B: Backend, C: Comm<B::Matrix, B::Scores>>(
    stack: &mut Option<Stack<B>>,
    rank: &Rank<'_, B, C>,
    (qkv, attended, rows): Rows<'_, B::Matrix>,
    sources: &[KvRef<'_, B::Matrix>],
    tasks: &[AttentionTask],
) -> Result<(), RankError> {
    let (backend, shape, count) = (rank.backend, rank.shape(), rows.len());
    let shifted_by = |by| tasks.iter().map(|task| shifted(task, by)).collect::<Vec<_>>();
    let Some(Stack { queries, parts, lse, merged, .. }) = stack else {
        return Ok(backend.attention(shape, qkv, sources, &shifted_by(rows.start), attended, None)?);
    };
    let (combining, first) = rank.combining(count, shape.q_width());
    let queries = if first == rows.start {
        qkv
    } else {
        backend.copy_rows(qkv, rows.start, count, queries, first)?;
        &*queries
    };
    backend.attention(shape, queries, sources, &shifted_by(first), parts, Some(lse))?;
    if let Some(combining) = combining {
        return Ok(combining.merge_partials(shape, count, (parts, lse), (attended, rows.start))?);
    }
    rank.gather_partials(count, Partials::Attention(parts, lse))?;
    backend.merge_stacked(shape, count, rank.comm.size(), parts, lse, merged)?;
    Ok(backend.copy_rows(merged, 0, count, attended, rows.start)?)
}

/// Which row of a pass is what; the same in every layer.
struct Pass {
    positions: Vec<u32>,
    /// Rows of each sequence.
    rows: Vec<Range<usize>>,
    /// What each sequence attends to on this rank.
    tasks: Vec<AttentionTask>,
}

impl Pass {
    fn new<B: Backend>(fed: &[Fed<'_, B>]) -> Self {
        let mut pass = Self { positions: Vec::new(), rows: Vec::new(), tasks: Vec::new() };
        for (source, (sequence, tokens)) in fed.iter().enumerate() {
            let first = pass.positions.len();
            let rows = first..first + tokens.len();
            pass.positions.extend(sequence.positions(tokens.len()));
            pass.tasks.push(sequence.task(source, rows.clone()));
            pass.rows.push(rows);
        }
        pass
    }

    fn is_single_tokens(&self) -> bool {
        self.rows.len() == self.positions.len()
    }
}

/// A task whose queries stand further down.
fn shifted(task: &AttentionTask, by: usize) -> AttentionTask {
    AttentionTask { queries: task.queries.start + by..task.queries.end + by, segments: task.segments.clone() }
}
