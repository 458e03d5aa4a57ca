//! What documents of each length of a mix cost on groups of each size.
//!
//! Invariant: computed once; the simulation looks nothing else up but the cost of a step of what generates.

use std::collections::BTreeMap;

use super::mix::Mix;
use crate::cost::CostModel;
use crate::engine::schedule::Needs;
use crate::plan::route::Offer;
use crate::plan::{PlanError, PrefillPlan, QUERY_CHUNK};

/// A document on a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Profile {
    /// What the group's schedule has to know.
    pub needs: Needs,
    /// Seconds of a layer of its prefill.
    pub layer_s: f64,
    /// Seconds of a pass of its query after the context.
    pub query_pass_s: f64,
    /// Tokens that are kept, the query's among them.
    pub kept_tokens: usize,
}

impl Profile {
    /// Seconds until it generates, if nothing else runs.
    pub fn prefill_s(&self) -> f64 {
        self.layer_s * self.needs.layers as f64 + self.query_pass_s * self.needs.query_passes as f64
    }

    /// As routing asks for it.
    pub fn offer(&self) -> Offer {
        let Needs { kept_bytes, transient_bytes, .. } = self.needs;
        Offer { seconds: self.prefill_s(), kept_bytes, transient_bytes }
    }

    /// Bytes it takes on a rank while it prefills.
    pub fn bytes(&self) -> u64 {
        self.needs.kept_bytes.saturating_add(self.needs.transient_bytes)
    }
}

/// Profiles of all lengths of a mix on groups of some sizes.
pub struct Profiles<'a> {
    /// What predicts.
    pub model: &'a CostModel,
    /// By size of the group, then by the part of the mix; `None` where it does not fit.
    by_ranks: BTreeMap<usize, Vec<Option<Profile>>>,
    budgets: BTreeMap<usize, u64>,
}

impl<'a> Profiles<'a> {
    /// `plan` cuts a context of so many tokens for so many ranks; `new_tokens` are generated; `at_once` sequences share a group.
    pub fn new(
        model: &'a CostModel,
        mix: &Mix,
        sizes: &[usize],
        at_once: usize,
        new_tokens: usize,
        plan: impl Fn(usize, usize) -> Result<PrefillPlan, PlanError>,
    ) -> Result<Self, PlanError> {
        let (mut by_ranks, mut budgets) = (BTreeMap::new(), BTreeMap::new());
        for &ranks in sizes {
            let budget = model.memory_budget().saturating_sub(model.fixed_memory(ranks, at_once));
            let of_part = |tokens: usize| {
                let profile = profile(model, &plan(tokens, ranks)?, ranks, new_tokens);
                Ok((profile.bytes() <= budget).then_some(profile))
            };
            let profiles = mix.parts.iter().map(|part| of_part(part.tokens)).collect::<Result<Vec<_>, PlanError>>()?;
            by_ranks.insert(ranks, profiles);
            budgets.insert(ranks, budget);
        }
        Ok(Self { model, by_ranks, budgets })
    }

    /// A document of one part of the mix on a group of `ranks`; `None` if it does not fit.
    pub fn get(&self, ranks: usize, part: usize) -> Option<&Profile> {
        self.by_ranks.get(&ranks)?.get(part)?.as_ref()
    }

    /// Sizes of groups, ascending.
    pub fn sizes(&self) -> impl Iterator<Item = usize> {
        self.by_ranks.keys().copied()
    }

    /// Bytes that the sequences of a group may take on each rank.
    pub fn budget_bytes(&self, ranks: usize) -> u64 {
        self.budgets.get(&ranks).copied().unwrap_or(0)
    }
}

fn profile(model: &CostModel, plan: &PrefillPlan, ranks: usize, new_tokens: usize) -> Profile {
    let layers = model.shape.layers;
    let prefill = model.prefill(plan, ranks);
    // As the engine counts them: none for a query that goes with its context.
    let query_passes = (plan.query - plan.query_rows()).div_ceil(QUERY_CHUNK);
    let first_token_s = model.query_pass_s(plan, ranks);
    let [kept_bytes, transient_bytes] = model.memory_parts(plan, ranks, new_tokens);
    let busiest = prefill.ranks.iter().map(|rank| rank.flops).fold(0.0, f64::max);
    Profile {
        needs: Needs { layers, layer_flops: busiest / layers as f64, query_passes, kept_bytes, transient_bytes },
        layer_s: (prefill.seconds + if query_passes == 0 { first_token_s } else { 0.0 }) / layers as f64,
        query_pass_s: first_token_s / query_passes.max(1) as f64,
        kept_tokens: model.kept_tokens(plan),
    }
}
