//! Which rank runs which hosts, and which token stands in which row of a rank's matrices.
//!
//! Invariant: ranks take contiguous runs of hosts in order, so that a rank's local blocks are one run of the context; the
//! anchor, being the same for every host, is in a rank's rows at most once.

use std::ops::Range;

use super::{PrefillPlan, Selector};

/// Rows of one rank during prefill: `[anchor | local block of each host | probe of each host]`.
///
/// A probe is the query as it would follow a host's local block, at its real positions; the query-aware selector scores with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankLayout {
    /// Hosts of the plan; empty for an idle rank.
    pub hosts: Range<usize>,
    /// Rows of the anchor; empty if no host of the rank has one.
    pub anchor: Range<usize>,
    /// Rows of the local block of each host.
    pub locals: Vec<Range<usize>>,
    /// Rows of the probe of each host; empty for one that has none.
    pub probes: Vec<Range<usize>>,
    /// Rows in all.
    pub rows: usize,
}

impl PrefillPlan {
    /// Ranks that have something to do in prefill, out of `ranks`: the first ones.
    pub fn active_ranks(&self, ranks: usize) -> usize {
        ranks.min(self.hosts.len())
    }

    /// Hosts of one of `ranks` ranks: contiguous, and as even as can be. Earlier ranks take the remainder, because later
    /// hosts have longer passing blocks.
    pub fn hosts_of(&self, rank: usize, ranks: usize) -> Range<usize> {
        let active = self.active_ranks(ranks);
        let (each, over) = (self.hosts.len() / active, self.hosts.len() % active);
        let first = |rank: usize| rank.min(active) * each + rank.min(over);
        first(rank)..first(rank + 1)
    }

    /// Rows of one of `ranks` ranks.
    pub fn layout(&self, rank: usize, ranks: usize) -> RankLayout {
        let hosts = self.hosts_of(rank, ranks);
        let mut rows = 0;
        let mut take = |count: usize| {
            rows += count;
            rows - count..rows
        };
        let has_anchor = hosts.clone().any(|host| host > 0);
        let anchor = take(self.anchor.as_ref().filter(|_| has_anchor).map_or(0, |anchor| anchor.len));
        let locals = self.hosts[hosts.clone()].iter().map(|host| take(host.local.len())).collect();
        let probed = |compressed: usize| self.selector == Selector::QueryAware && compressed > 0;
        let probes = self.hosts[hosts.clone()]
            .iter()
            .map(|host| take(if probed(host.compressed) { self.query } else { 0 }))
            .collect();
        RankLayout { hosts, anchor, locals, probes, rows }
    }
}

impl RankLayout {
    /// Rows of all local blocks together: they are neighbours.
    pub fn local_rows(&self) -> Range<usize> {
        match (self.locals.first(), self.locals.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }

    /// Tokens of the rows.
    pub fn tokens(&self, plan: &PrefillPlan, context: &[u32], query: &[u32]) -> Vec<u32> {
        let mut tokens = if self.anchor.is_empty() { Vec::new() } else { plan.anchor_tokens(context, query) };
        for host in &plan.hosts[self.hosts.clone()] {
            tokens.extend_from_slice(&context[host.local.clone()]);
        }
        for probe in &self.probes {
            tokens.extend_from_slice(&query[..probe.len()]);
        }
        tokens
    }

    /// Positions of the rows: `0..` in the anchor, those of the document in the local blocks, those after the document in probes.
    pub fn positions(&self, plan: &PrefillPlan) -> Vec<u32> {
        let locals = plan.hosts[self.hosts.clone()].iter().map(|host| host.local.clone());
        let probes = self.probes.iter().map(|probe| plan.context..plan.context + probe.len());
        // A plan holds no more tokens than fit into 32 bits.
        self.anchor.clone().chain(locals.chain(probes).flatten()).map(|position| position as u32).collect()
    }
}
