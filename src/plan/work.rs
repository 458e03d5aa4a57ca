//! How much there is to compute, for schedules: operations of a layer, by the rank that has most.
//!
//! Invariant: an estimate; nothing but the order and the pace of work follows from it.

use super::{AttentionMode, Footprint, PrefillPlan, RankLayout};

impl PrefillPlan {
    /// Floating-point operations of one layer of the prefill on the busiest of `ranks` ranks.
    pub fn layer_flops(&self, ranks: usize, model: &Footprint) -> f64 {
        let active = self.active_ranks(ranks);
        (0..active).map(|rank| self.layer_flops_of_rank(rank, ranks, model)).fold(0.0, f64::max)
    }

    fn layer_flops_of_rank(&self, rank: usize, ranks: usize, model: &Footprint) -> f64 {
        let layout = self.layout(rank, ranks);
        let q_width = model.heads * model.head_dim;
        let weights = model.hidden * (2 * q_width + 2 * model.kv_heads * model.head_dim + 3 * model.intermediate);
        let products = 2.0 * (layout.rows * weights) as f64;
        products + 4.0 * q_width as f64 * self.attended_pairs(rank, ranks, &layout, model)
    }

    /// Pairs of a query and a key that a rank attends to, of all heads.
    fn attended_pairs(&self, rank: usize, ranks: usize, layout: &RankLayout, model: &Footprint) -> f64 {
        let half = |rows: usize| (rows * rows) as f64 / 2.0;
        if self.mode == AttentionMode::Ulysses {
            let share = self.kv_heads_of(rank, ranks, model.kv_heads).len() as f64 / model.kv_heads as f64;
            return share * half(self.context);
        }
        let anchor = layout.anchor.len();
        let mut pairs = half(anchor);
        for (&host, local) in layout.hosts.iter().zip(&layout.locals) {
            let before = match self.mode {
                AttentionMode::Ring => self.hosts[host].local.start,
                _ if host > 0 => self.compressed_before(host) + anchor,
                _ => 0,
            };
            pairs += half(local.len()) + (local.len() * before) as f64;
        }
        pairs
    }
}
