//! Which keys and values of a context are kept for the query and for what is generated, where there is a budget for them: per layer, KV head and
//! host those that the retaining heads hold to be the most telling.
//!
//! Invariant: prefill itself sees everything; what is kept of a host depends on that host's own rows alone, so that ranks change nothing.

use std::ops::Range;

use crate::backend::{Backend, BackendError};
use crate::comm::Comm;
use crate::plan::{PrefillPlan, RankLayout};

use super::kv::KeyValues;
use super::rank::{Rank, RankError};

/// Scores of a rank's rows, and where what is kept is put together.
pub(super) struct Eviction<B: Backend> {
    hosts: Vec<KeptHost>,
    /// Rows with scores: up to the end of the last local block.
    scored: usize,
    scores: B::Scores,
    chosen: KeyValues<B::Matrix>,
}

struct KeptHost {
    /// The rows that stand before its local block in its sequence.
    anchor: Range<usize>,
    local: Range<usize>,
    kept: usize,
}

impl<B: Backend> Eviction<B> {
    /// Buffers for a plan; `None` if it keeps everything.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Option<Self>, RankError> {
        if !plan.evicts() {
            return Ok(None);
        }
        if rank.weights.retaining_heads.is_none() {
            let reason = "the plan keeps what retaining heads choose, and the weights have none".to_owned();
            return Err(BackendError::Unavailable(reason).into());
        }
        let host = |(&host, local): (&usize, &Range<usize>)| KeptHost {
            anchor: if host > 0 { layout.anchor.clone() } else { 0..0 },
            local: local.clone(),
            kept: plan.hosts[host].kept_rows(),
        };
        let hosts: Vec<_> = layout.hosts.iter().zip(&layout.locals).map(host).collect();
        let (scored, most) = (layout.local_rows().end, hosts.iter().map(|host| host.kept).max().unwrap_or(0));
        Ok(Some(Self {
            hosts,
            scored,
            scores: rank.backend.scores(rank.shape().kv_heads, scored.max(1))?,
            chosen: KeyValues::new(rank.backend, rank.shape(), most)?,
        }))
    }

    /// Before RoPE is applied.
    pub fn score<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        qkv: &B::Matrix,
    ) -> Result<(), RankError> {
        let head = rank.weights.retaining_heads.as_ref().and_then(|heads| heads.get(layer));
        if let Some(head) = head.filter(|_| self.scored > 0) {
            rank.backend.retaining_scores(self.scored, qkv, &head.w1, &head.w2, &mut self.scores)?;
        }
        Ok(())
    }

    /// Copies what is kept of each host, in their order, to the first rows of `kept`.
    pub fn keep<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        working: &KeyValues<B::Matrix>,
        kept: &mut KeyValues<B::Matrix>,
    ) -> Result<(), RankError> {
        let (backend, mut next) = (rank.backend, 0);
        for KeptHost { anchor, local, kept: count } in &self.hosts {
            let rows = backend.top_k(&self.scores, anchor.clone(), local.clone(), 0, *count, true)?;
            // Together first: the cache may be of a type that only whole rows can be written in.
            backend.gather_kv(rank.shape(), &rows, 0, working.view(), self.chosen.at(0))?;
            kept.copy_from(backend, next, &self.chosen, 0, *count)?;
            next += count;
        }
        Ok(())
    }
}
