//! The prefill: the rows of a rank through all layers, one layer a call, keeping the keys and values of its local blocks.
//!
//! Invariant: a rank without rows takes part in every collective and in nothing else.

use std::ops::Range;

use crate::backend::{AttentionTask, Backend};
use crate::comm::Comm;
use crate::plan::{PrefillPlan, RankLayout};

use super::attention::Attention;
use super::command::OwnedJob;
use super::decode::{Decoder, Sequence};
use super::eviction::Eviction;
use super::kv::{KeyValues, KvCache};
use super::rank::{Activations, Rank, RankError};

/// A context on its way through the layers.
pub(super) struct Prefill<B: Backend> {
    plan: PrefillPlan,
    state: PrefillState<B>,
    attention: Attention<B>,
    eviction: Option<Eviction<B>>,
    cache: KvCache<B>,
    layers_done: usize,
}

/// What the layer loop works on; buffers are reused by every layer.
pub(super) struct PrefillState<B: Backend> {
    /// Which row is what.
    pub layout: RankLayout,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// Rows of the query, after all others; empty where it goes after the context.
    query: Range<usize>,
    /// Activations of the rows.
    pub activations: Activations<B>,
    /// Keys (after RoPE) and values of the rows in the current layer.
    pub working: KeyValues<B::Matrix>,
}

impl<B: Backend> Prefill<B> {
    /// Takes all the memory that the sequence will need on this rank, and embeds its rows.
    pub fn begin<C: Comm<B::Matrix, B::Scores>>(rank: &Rank<'_, B, C>, job: &OwnedJob) -> Result<Self, RankError> {
        let plan = job.plan.clone();
        let layout = plan.layout(rank.comm.rank(), rank.comm.size());
        let cache = KvCache::new(rank.backend, rank.spec, &plan, &layout, job.new_tokens)?;
        let attention = Attention::new(rank, &plan, &layout)?;
        let eviction = Eviction::new(rank, &plan, &layout)?;
        let state = PrefillState::new(rank, job, layout)?;
        Ok(Self { plan, state, attention, eviction, cache, layers_done: 0 })
    }

    /// Takes the next layer; `true` if it was the last. The logits of a query that has gone through with its context are in the decoder then.
    pub fn layer<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        decoder: &mut Decoder<B>,
    ) -> Result<bool, RankError> {
        let layer = self.layers_done;
        self.layers_done += 1;
        let is_last = self.layers_done == rank.spec.layers;
        let Self { plan, state, attention, eviction, cache, .. } = self;
        if state.query.end > 0 {
            let (activations, weights) = (&mut state.activations, &rank.weights.layers[layer]);
            activations.project(rank.backend, rank.spec, weights, state.query.end)?;
        }
        if !is_last {
            attention.score_before_rope(rank, layer, state)?;
        }
        if let Some(eviction) = eviction {
            eviction.score(rank, layer, &state.activations.qkv)?;
        }
        state.rope(rank)?;
        state.keep(rank, eviction.as_mut(), layer, cache)?;
        if !is_last {
            attention.attend(rank, plan, state)?;
        }
        state.attend_query(rank, layer, decoder, cache)?;
        // Of the last layer only the context's keys and values are used: nothing reads its hidden state after it.
        match is_last {
            true => state.close_query(rank, layer, decoder)?,
            false => state.close(rank, layer)?,
        }
        Ok(is_last)
    }

    /// What is left of a prefill whose last layer has been taken.
    pub fn finish(self) -> Sequence<B> {
        Sequence::new(self.plan.context, self.state.query.len(), self.cache)
    }
}

impl<B: Backend> PrefillState<B> {
    fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        job: &OwnedJob,
        layout: RankLayout,
    ) -> Result<Self, RankError> {
        let query = layout.rows..layout.rows + job.plan.query_rows();
        let mut activations = Activations::new(rank.backend, rank.spec, query.end)?;
        let mut tokens = layout.tokens(&job.plan, &job.context, &job.query);
        tokens.extend_from_slice(&job.query[..query.len()]);
        if !tokens.is_empty() {
            rank.backend.embed(&rank.weights.embedding, &tokens, &mut activations.x)?;
        }
        let mut positions = layout.positions(&job.plan);
        // A plan holds no more tokens than fit into 32 bits.
        positions.extend((job.plan.context..job.plan.context + query.len()).map(|position| position as u32));
        let working = KeyValues::new(rank.backend, rank.shape(), query.end)?;
        Ok(Self { positions, query, layout, activations, working })
    }

    fn rope<C: Comm<B::Matrix, B::Scores>>(&mut self, rank: &Rank<'_, B, C>) -> Result<(), RankError> {
        let (rope, rows, place) = (&rank.spec.rope, self.query.end, self.working.at(0));
        if rows > 0 {
            let (inv_freq, qkv) = (&rope.inv_freq, &mut self.activations.qkv);
            rank.backend.rope_store(rank.shape(), 0..rows, &self.positions, inv_freq, rope.scale, qkv, place)?;
        }
        Ok(())
    }

    /// Keeps the keys and values of the local blocks and of the query.
    fn keep<C: Comm<B::Matrix, B::Scores>>(
        &self,
        rank: &Rank<'_, B, C>,
        eviction: Option<&mut Eviction<B>>,
        layer: usize,
        cache: &mut KvCache<B>,
    ) -> Result<(), RankError> {
        let (local, query) = (self.layout.local_rows(), self.query.clone());
        let (kept, tail) = (&mut cache.layers[layer], cache.local);
        match eviction {
            Some(eviction) => eviction.keep(rank, &self.working, kept)?,
            None => kept.copy_from(rank.backend, 0, &self.working, local.start, local.len())?,
        }
        if cache.tail > 0 {
            kept.copy_from(rank.backend, tail, &self.working, query.start, query.len())?;
        }
        Ok(())
    }

    /// The query sees what every rank keeps.
    fn attend_query<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        decoder: &mut Decoder<B>,
        cache: &KvCache<B>,
    ) -> Result<(), RankError> {
        if self.query.is_empty() {
            return Ok(());
        }
        let task = AttentionTask { queries: 0..self.query.len(), segments: cache.segments(0, 0, self.query.len()) };
        let Activations { qkv, attended, .. } = &mut self.activations;
        decoder.attend(rank, (qkv, attended, self.query.clone()), &[cache.layers[layer].view()], &[task])
    }

    fn close<C: Comm<B::Matrix, B::Scores>>(&mut self, rank: &Rank<'_, B, C>, layer: usize) -> Result<(), RankError> {
        if self.query.end > 0 {
            self.activations.close(rank.backend, rank.spec, &rank.weights.layers[layer], self.query.end)?;
        }
        Ok(())
    }

    /// The query alone goes on, in the decoder's buffers.
    fn close_query<C: Comm<B::Matrix, B::Scores>>(
        &self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        decoder: &mut Decoder<B>,
    ) -> Result<(), RankError> {
        match self.query.is_empty() {
            true => Ok(()),
            false => {
                decoder.close_rows(rank, layer, &self.activations, self.query.clone())?;
                decoder.give_logits(rank, 1)
            }
        }
    }
}
