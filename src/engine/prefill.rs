//! The prefill: the rows of a rank through all layers, one layer a call, keeping the keys and values of its local blocks.
//!
//! Invariant: a rank without rows takes part in every collective and in nothing else.

use crate::backend::Backend;
use crate::comm::Comm;
use crate::plan::{PrefillPlan, RankLayout};

use super::attention::Attention;
use super::command::OwnedJob;
use super::decode::Sequence;
use super::kv::{KeyValues, KvCache};
use super::rank::{Activations, Rank, RankError};

/// A context on its way through the layers.
pub(super) struct Prefill<B: Backend> {
    plan: PrefillPlan,
    state: PrefillState<B>,
    attention: Attention<B>,
    cache: KvCache<B>,
    layers_done: usize,
}

/// What the layer loop works on; buffers are reused by every layer.
pub(super) struct PrefillState<B: Backend> {
    /// Which row is what.
    pub layout: RankLayout,
    /// Position of each row.
    pub positions: Vec<u32>,
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
        let state = PrefillState::new(rank, job, layout)?;
        Ok(Self { plan, state, attention, cache, layers_done: 0 })
    }

    /// Takes the next layer; `true` if it was the last.
    pub fn layer<C: Comm<B::Matrix, B::Scores>>(&mut self, rank: &Rank<'_, B, C>) -> Result<bool, RankError> {
        let Self { plan, state, attention, cache, layers_done } = self;
        state.layer(rank, plan, *layers_done, attention, cache)?;
        *layers_done += 1;
        Ok(*layers_done == rank.spec.layers)
    }

    /// What is left of a prefill whose last layer has been taken.
    pub fn finish(self) -> Sequence<B> {
        Sequence::new(self.plan.context, self.cache)
    }
}

impl<B: Backend> PrefillState<B> {
    fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        job: &OwnedJob,
        layout: RankLayout,
    ) -> Result<Self, RankError> {
        let mut activations = Activations::new(rank.backend, rank.spec, layout.rows)?;
        if layout.rows > 0 {
            let tokens = layout.tokens(&job.plan, &job.context, &job.query);
            rank.backend.embed(&rank.weights.embedding, &tokens, &mut activations.x)?;
        }
        let working = KeyValues::new(rank.backend, rank.shape(), layout.rows)?;
        Ok(Self { positions: layout.positions(&job.plan), layout, activations, working })
    }

    fn layer<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layer: usize,
        attention: &mut Attention<B>,
        cache: &mut KvCache<B>,
    ) -> Result<(), RankError> {
        let weights = &rank.weights.layers[layer];
        let rows = self.layout.rows;
        if rows > 0 {
            self.activations.project(rank.backend, rank.spec, weights, rows)?;
        }
        // Of the last layer only keys and values are used: nothing reads the context's hidden state after it.
        let is_last = layer + 1 == rank.spec.layers;
        if !is_last {
            attention.score_before_rope(rank, layer, self)?;
        }
        if rows > 0 {
            self.rope(rank)?;
            let local = self.layout.local_rows();
            cache.layers[layer].copy_from(rank.backend, 0, &self.working, local.start, local.len())?;
        }
        if is_last {
            return Ok(());
        }
        attention.attend(rank, plan, self)?;
        if rows > 0 {
            self.activations.close(rank.backend, rank.spec, weights, rows)?;
        }
        Ok(())
    }

    fn rope<C: Comm<B::Matrix, B::Scores>>(&mut self, rank: &Rank<'_, B, C>) -> Result<(), RankError> {
        let rope = &rank.spec.rope;
        let (rows, qkv) = (0..self.layout.rows, &mut self.activations.qkv);
        let destination = self.working.at(0);
        rank.backend.rope_store(rank.shape(), rows, &self.positions, &rope.inv_freq, rope.scale, qkv, destination)?;
        Ok(())
    }
}
