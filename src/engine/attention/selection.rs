//! What a host passes on: scores for its tokens, the best of them per KV head, gathered from all hosts.
//!
//! Invariant: equal scores are broken by position, random ones follow from seed, layer, head and position; so the choice does
//! not depend on which rank runs the host.

use std::ops::Range;

use crate::backend::{Backend, BackendError};
use crate::comm::Comm;
use crate::engine::kv::KeyValues;
use crate::engine::prefill::PrefillState;
use crate::engine::rank::{Rank, RankError};
use crate::plan::{Host, PrefillPlan, RankLayout, Selector};

/// Scores of a rank's rows, and the compressed blocks of all hosts.
pub struct Selection<B: Backend> {
    selector: Selector,
    /// Rows with scores: up to the end of the last host here that passes something on.
    scored: usize,
    scores: B::Scores,
    /// Compressed blocks of all hosts, in the order of the ranks; elsewhere while they are on their way.
    passing: Option<KeyValues<B::Matrix>>,
    /// The same in FP8, if that is how they travel.
    quantized: Option<B::Matrix>,
    /// Rows of them that each rank fills, and the rows of each host.
    counts: Vec<usize>,
    rows: Vec<Range<usize>>,
}

/// Compressed blocks on their way.
pub enum Gathering<KeysAndValues, Quantized> {
    Native(KeysAndValues),
    Fp8(Quantized),
}

impl<B: Backend> Selection<B> {
    /// Buffers for a plan; `None` if it passes nothing on.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Option<Self>, RankError> {
        if plan.compressed() == 0 {
            return Ok(None);
        }
        if plan.selector == Selector::RetainingHead && rank.weights.retaining_heads.is_none() {
            let reason = "the plan selects by retaining heads, and the weights have none".to_owned();
            return Err(BackendError::Unavailable(reason).into());
        }
        let (backend, ranks) = (rank.backend, rank.comm.size());
        let compress = |host: &usize| plan.hosts[*host].compressed > 0;
        let scored = layout.hosts.iter().rposition(compress).map_or(0, |index| layout.locals[index].end);
        Ok(Some(Self {
            selector: plan.selector,
            scored,
            scores: backend.scores(rank.shape().kv_heads, scored.max(1))?,
            passing: Some(KeyValues::new(backend, rank.shape(), plan.compressed())?),
            quantized: match plan.passes_in_fp8() {
                true => Some(backend.quantized_kv(rank.shape(), plan.compressed())?),
                false => None,
            },
            counts: plan.compressed_of_ranks(ranks),
            rows: plan.compressed_rows(ranks),
        }))
    }

    /// Scores that come before RoPE or need no keys at all: those of retaining heads, and random ones.
    pub fn score_before_rope<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        state: &PrefillState<B>,
    ) -> Result<(), RankError> {
        if self.scored == 0 {
            return Ok(());
        }
        match (self.selector, &rank.weights.retaining_heads) {
            (Selector::RetainingHead, Some(heads)) => {
                let (head, qkv) = (&heads[layer], &state.activations.qkv);
                rank.backend.retaining_scores(self.scored, qkv, &head.w1, &head.w2, &mut self.scores)?;
            }
            (Selector::Random { seed }, _) => {
                let values = random_scores(seed, layer, rank.shape().kv_heads, &state.positions[..self.scored]);
                rank.backend.set_scores(&values, &mut self.scores)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Chooses and copies what the rank's hosts pass on, and starts gathering it from all ranks.
    pub fn start<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &PrefillState<B>,
    ) -> Result<Gathering<C::Pending<2>, C::Pending<1>>, RankError> {
        let mut passing = self.passing.take().expect("in place between layers");
        for (index, &host) in state.layout.hosts.iter().enumerate() {
            if plan.hosts[host].compressed > 0 {
                let chosen = self.choose(rank, plan, state, index)?;
                let destination = passing.at(self.rows[host].start);
                rank.backend.gather_kv(rank.shape(), &chosen, 0, state.working.view(), destination)?;
            }
        }
        let Some(mut quantized) = self.quantized.take() else {
            return Ok(Gathering::Native(passing.all_gather(&rank.comm, &self.counts)?));
        };
        let me = rank.comm.rank();
        let (first, own) = (self.counts[..me].iter().sum(), self.counts[me]);
        rank.backend.quantize_kv(rank.shape(), passing.view(), first, own, &mut quantized, first)?;
        self.passing = Some(passing);
        Ok(Gathering::Fp8(rank.comm.all_gather([quantized], &self.counts)?))
    }

    /// Awaits what [`Selection::start`] started: the compressed blocks of all hosts.
    pub fn finish<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        gathering: Gathering<C::Pending<2>, C::Pending<1>>,
    ) -> Result<&KeyValues<B::Matrix>, RankError> {
        match gathering {
            Gathering::Native(moving) => Ok(self.passing.insert(KeyValues::arrived(&rank.comm, moving)?)),
            Gathering::Fp8(moving) => {
                let [quantized] = rank.comm.finish(moving)?;
                let quantized = self.quantized.insert(quantized);
                let passing = self.passing.as_mut().expect("left in place");
                // The rank's own blocks too: what a host sees does not depend on where it runs.
                let rows = self.counts.iter().sum();
                rank.backend.restore_kv(rank.shape(), quantized, 0, rows, passing.at(0))?;
                Ok(passing)
            }
        }
    }

    /// The best rows of a host; `index` counts the hosts of this rank.
    fn choose<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &PrefillState<B>,
        index: usize,
    ) -> Result<B::Rows, RankError> {
        let layout = &state.layout;
        let (host, local) = (layout.hosts[index], layout.locals[index].clone());
        if self.selector == Selector::QueryAware {
            let (probe, qkv, k) = (layout.probes[index].clone(), &state.activations.qkv, state.working.keys());
            rank.backend.query_aware_scores(rank.shape(), probe, qkv, self.scored, k, &mut self.scores)?;
        }
        let anchor = if host > 0 { layout.anchor.clone() } else { 0..0 };
        // Random scores are not pooled: neighbours of a high one would follow it.
        let pool = !matches!(self.selector, Selector::Random { .. });
        let Host { excluded, compressed, .. } = plan.hosts[host];
        Ok(rank.backend.top_k(&self.scores, anchor, local, excluded, compressed, pool)?)
    }
}

/// Scores in `0..1` for each KV head and row; those of the anchor are never looked at.
fn random_scores(seed: u64, layer: usize, kv_heads: usize, positions: &[u32]) -> Vec<f32> {
    let of_head = |head| positions.iter().map(move |position| random_score(seed, layer, head, *position as usize));
    (0..kv_heads).flat_map(of_head).collect()
}

/// The random score of a token: 24 bits of a mix (splitmix64) of all that identifies it.
pub fn random_score(seed: u64, layer: usize, head: usize, position: usize) -> f32 {
    let token =
        [layer as u64, head as u64, position as u64].into_iter().fold(seed, |state, part| mix(state ^ mix(part)));
    (token >> 40) as f32 / (1u64 << 24) as f32
}

fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::random_score;

    #[test]
    fn random_scores_are_spread_evenly_and_differ_by_all_that_identifies_a_token() {
        let scores: Vec<f32> = (0..4000).map(|position| random_score(1, 2, 3, position)).collect();
        let mean = scores.iter().sum::<f32>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.03 && scores.iter().all(|score| (0.0..1.0).contains(score)), "{mean}");
        let one = random_score(1, 2, 3, 4);
        for other in
            [random_score(0, 2, 3, 4), random_score(1, 3, 3, 4), random_score(1, 2, 2, 4), random_score(1, 2, 3, 5)]
        {
            assert_ne!(one, other);
        }
    }
}
