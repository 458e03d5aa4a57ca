//! Which rank runs which hosts, and which token stands in which row of a rank's matrices.
//!
//! Invariant: a rank's hosts ascend, so that what of its rows comes before a host is always a prefix of them; the anchor, being
//! the same for every host, is in a rank's rows at most once.

use std::ops::Range;

use super::{Placement, PrefillPlan, Selector};

/// Rows of one rank during prefill: `[anchor | local block of each host | probe of each host]`.
///
/// A probe is the query as it would follow a host's local block, at its real positions; the query-aware selector scores with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankLayout {
    /// Hosts of the plan, ascending; none for an idle rank.
    pub hosts: Vec<usize>,
    /// Rows of the anchor; empty if no host of the rank has one.
    pub anchor: Range<usize>,
    /// Rows of the local block of each host.
    pub locals: Vec<Range<usize>>,
    /// Rows of the probe of each host; empty for one that has none.
    pub probes: Vec<Range<usize>>,
    /// Rows in all.
    pub rows: usize,
}

/// Local blocks that follow each other in the context and in a rank's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The first of their hosts.
    pub first_host: usize,
    /// Their rows.
    pub rows: Range<usize>,
}

impl PrefillPlan {
    /// Ranks that have something to do in prefill, out of `ranks`: the first ones.
    pub fn active_ranks(&self, ranks: usize) -> usize {
        ranks.min(self.hosts.len())
    }

    /// Hosts of one of `ranks` ranks, ascending; their numbers differ by one at most. Contiguous: earlier ranks take the
    /// remainder, because later hosts see more. Paired: dealt to and fro, from the last host on, to rank 0 first.
    pub fn hosts_of(&self, rank: usize, ranks: usize) -> Vec<usize> {
        let (hosts, active) = (self.hosts.len(), self.active_ranks(ranks));
        match self.execution.placement {
            Placement::Contiguous => {
                let (each, over) = (hosts / active, hosts % active);
                let first = |rank: usize| rank.min(active) * each + rank.min(over);
                (first(rank)..first(rank + 1)).collect()
            }
            Placement::Paired => (0..hosts).filter(|host| dealt(hosts - 1 - host, active) == rank).collect(),
        }
    }

    /// The rank of the last host, which keeps the query and what is generated.
    pub fn last_rank(&self, ranks: usize) -> usize {
        match self.execution.placement {
            Placement::Contiguous => self.active_ranks(ranks) - 1,
            Placement::Paired => 0,
        }
    }

    /// KV heads, of `kv_heads`, that a rank attends with for all tokens (Ulysses): as even as can be. Where there are more ranks than
    /// heads, some have none.
    pub fn kv_heads_of(&self, rank: usize, ranks: usize, kv_heads: usize) -> Range<usize> {
        let active = self.active_ranks(ranks);
        let first = |rank: usize| kv_heads * rank.min(active) / active;
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
        let has_anchor = hosts.iter().any(|host| *host > 0);
        let anchor = take(self.anchor.as_ref().filter(|_| has_anchor).map_or(0, |anchor| anchor.len));
        let locals = hosts.iter().map(|host| take(self.hosts[*host].local.len())).collect();
        let probed = |host: usize| self.selector == Selector::QueryAware && self.hosts[host].compressed > 0;
        let probes = hosts.iter().map(|host| take(if probed(*host) { self.query } else { 0 })).collect();
        RankLayout { hosts, anchor, locals, probes, rows }
    }

    /// Rows that each rank adds to the compressed blocks of all hosts, which stand in the order of the ranks.
    pub fn compressed_of_ranks(&self, ranks: usize) -> Vec<usize> {
        let of_host = |host: &usize| self.hosts[*host].compressed;
        (0..ranks).map(|rank| self.hosts_of(rank, ranks).iter().map(of_host).sum()).collect()
    }

    /// Rows of each host's compressed block among those of all hosts.
    pub fn compressed_rows(&self, ranks: usize) -> Vec<Range<usize>> {
        let mut blocks = vec![0..0; self.hosts.len()];
        let mut next = 0;
        for host in (0..ranks).flat_map(|rank| self.hosts_of(rank, ranks)) {
            blocks[host] = next..next + self.hosts[host].compressed;
            next = blocks[host].end;
        }
        blocks
    }

    /// The passing block of a host: runs of rows of `compressed_rows`, ascending, as few as there can be.
    pub fn passing_runs(&self, host: usize, compressed_rows: &[Range<usize>]) -> Vec<Range<usize>> {
        let mut seen: Vec<_> = compressed_rows[..host].iter().filter(|rows| !rows.is_empty()).cloned().collect();
        seen.sort_by_key(|rows| rows.start);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for rows in seen {
            match runs.last_mut().filter(|run| run.end == rows.start) {
                Some(run) => run.end = rows.end,
                None => runs.push(rows),
            }
        }
        runs
    }
}

/// To whom the `turn`-th card goes if they are dealt to and fro.
fn dealt(turn: usize, players: usize) -> usize {
    let (round, place) = (turn / players, turn % players);
    if round.is_multiple_of(2) { place } else { players - 1 - place }
}

impl RankLayout {
    /// Rows of all local blocks together: they are neighbours.
    pub fn local_rows(&self) -> Range<usize> {
        match (self.locals.first(), self.locals.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }

    /// The local blocks, those joined that follow each other in the context.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut next_host = None;
        for (host, rows) in self.hosts.iter().zip(&self.locals) {
            match runs.last_mut().filter(|_| next_host == Some(*host)) {
                Some(run) => run.rows.end = rows.end,
                None => runs.push(Run { first_host: *host, rows: rows.clone() }),
            }
            next_host = Some(host + 1);
        }
        runs
    }

    /// Local rows of the hosts before `host`: the first ones.
    pub fn rows_before(&self, host: usize) -> Range<usize> {
        let first = self.local_rows().start;
        let before = self.hosts.iter().take_while(|other| **other < host).count();
        first..self.locals[..before].last().map_or(first, |rows| rows.end)
    }

    /// Tokens of the rows.
    pub fn tokens(&self, plan: &PrefillPlan, context: &[u32], query: &[u32]) -> Vec<u32> {
        let mut tokens = if self.anchor.is_empty() { Vec::new() } else { plan.anchor_tokens(context, query) };
        for host in &self.hosts {
            tokens.extend_from_slice(&context[plan.hosts[*host].local.clone()]);
        }
        for probe in &self.probes {
            tokens.extend_from_slice(&query[..probe.len()]);
        }
        tokens
    }

    /// Positions of the rows: `0..` in the anchor, those of the document in the local blocks, those after the document in probes.
    pub fn positions(&self, plan: &PrefillPlan) -> Vec<u32> {
        let locals = self.hosts.iter().map(|host| plan.hosts[*host].local.clone());
        let probes = self.probes.iter().map(|probe| plan.context..plan.context + probe.len());
        // A plan holds no more tokens than fit into 32 bits.
        self.anchor.clone().chain(locals.chain(probes).flatten()).map(|position| position as u32).collect()
    }
}
