//! What one layer of a prefill makes a rank do: FLOPs and bytes, counted as the layer loop issues them.
//!
//! Invariant: the anchor is counted once a rank, a causal block by its visible pairs, a probe where the plan has one; a
//! multiplication with its addition is 2 FLOPs. A test counts what the layer loop really asks of a backend and compares.

use crate::plan::{AttentionMode, PrefillPlan, RankLayout, Selector};

use super::shape::ModelShape;

/// One layer of all ranks, and what travels between them in it.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWork {
    /// Of each rank, the active ones.
    pub ranks: Vec<RankWork>,
    /// What travels.
    pub exchange: Exchange,
}

/// What travels between the ranks in one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Exchange {
    /// Nothing.
    Nothing,
    /// All compressed blocks come to every rank, in bytes of all together.
    Gather { bytes: f64 },
    /// Blocks of so many bytes at most go from rank to rank.
    Rotate { bytes: f64 },
}

/// One layer of one rank that is not the last: that one ends after its keys and values are stored.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RankWork {
    /// Rows of anchor, local blocks and probes.
    pub rows: usize,
    /// Projection to queries, keys and values.
    pub qkv_flops: f64,
    /// Retaining heads, or the scores of the query's tokens.
    pub scoring_flops: f64,
    /// Attention that needs nothing of other ranks.
    pub own_attention_flops: f64,
    /// Attention to what other ranks send, in the order in which it comes: one piece, or one a step of the ring.
    pub late_attention_flops: Vec<f64>,
    /// Output projection.
    pub o_flops: f64,
    /// MLP.
    pub ffn_flops: f64,
    /// Bytes that norms, RoPE and copies read and write before attention.
    pub before_bytes: f64,
    /// Bytes that the norm before the MLP reads and writes.
    pub after_bytes: f64,
    /// Bytes that choosing and copying the compressed blocks reads and writes.
    pub selection_bytes: f64,
    /// Bytes that merging one late piece reads and writes.
    pub merge_bytes: f64,
}

impl RankWork {
    /// FLOPs of the layer, the selection included.
    pub fn flops(&self) -> f64 {
        let late: f64 = self.late_attention_flops.iter().sum();
        let attention = self.own_attention_flops + late;
        self.qkv_flops + self.scoring_flops + attention + self.o_flops + self.ffn_flops
    }
}

impl LayerWork {
    /// One layer of `plan` on `ranks` ranks; of idle ranks there is nothing to say.
    pub fn of(plan: &PrefillPlan, ranks: usize, shape: &ModelShape) -> Self {
        let active = plan.active_ranks(ranks);
        let layouts: Vec<RankLayout> = (0..active).map(|rank| plan.layout(rank, ranks)).collect();
        let row_bytes = (2 * shape.kv_width() * shape.element_bytes) as f64;
        let exchange = match plan.mode {
            _ if active == 1 => Exchange::Nothing,
            AttentionMode::Ring => {
                let longest = layouts.iter().map(|layout| layout.rows).max().unwrap_or(0);
                Exchange::Rotate { bytes: longest as f64 * row_bytes }
            }
            _ if plan.compressed() == 0 => Exchange::Nothing,
            _ => Exchange::Gather { bytes: plan.compressed() as f64 * row_bytes },
        };
        let count = Count { plan, shape, layouts: &layouts, is_apart: exchange != Exchange::Nothing };
        Self { ranks: (0..active).map(|rank| count.rank(rank)).collect(), exchange }
    }

    /// FLOPs of all ranks.
    pub fn flops(&self) -> f64 {
        self.ranks.iter().map(RankWork::flops).sum()
    }
}

/// FLOPs of so many rows times a matrix of so many elements.
pub(super) fn product(rows: usize, elements: usize) -> f64 {
    2.0 * rows as f64 * elements as f64
}

/// Pairs of a query and a key no later than it, in a block with itself.
fn causal_pairs(rows: usize) -> f64 {
    rows as f64 * (rows as f64 + 1.0) / 2.0
}

fn pairs(queries: usize, keys: usize) -> f64 {
    queries as f64 * keys as f64
}

struct Count<'a> {
    plan: &'a PrefillPlan,
    shape: &'a ModelShape,
    layouts: &'a [RankLayout],
    /// Whether what other ranks send is attended to apart.
    is_apart: bool,
}

impl Count<'_> {
    fn rank(&self, rank: usize) -> RankWork {
        let (layout, shape) = (&self.layouts[rank], self.shape);
        let (rows, local) = (layout.rows, layout.local_rows().len());
        let bytes = |elements: usize| (elements * shape.element_bytes) as f64;
        // Read and written.
        let norm = 2.0 * bytes(rows * shape.hidden);
        let rope = 2.0 * bytes(rows * shape.qkv_width());
        let kept = (local * (2 * shape.kv_width() * shape.element_bytes + shape.kept_row_bytes)) as f64;
        let (own, late) = match self.plan.mode {
            AttentionMode::Ring => self.ring(rank),
            _ => self.blocks(layout),
        };
        let pair_flops = 4.0 * shape.q_width() as f64;
        let late_rows = if late.is_empty() { 0 } else { rows };
        let (scoring_flops, selection_bytes) = self.selection(layout);
        RankWork {
            rows,
            qkv_flops: product(rows, shape.hidden * shape.qkv_width()),
            scoring_flops,
            own_attention_flops: pair_flops * own,
            late_attention_flops: late.into_iter().map(|pairs| pair_flops * pairs).collect(),
            o_flops: product(rows, shape.hidden * shape.q_width()),
            ffn_flops: product(rows, 3 * shape.hidden * shape.intermediate),
            before_bytes: norm + rope + kept,
            after_bytes: norm,
            selection_bytes,
            merge_bytes: 3.0 * bytes(late_rows * shape.q_width()) + 8.0 * (late_rows * shape.heads) as f64,
        }
    }

    /// Pairs of a ring's rank: its own block causally, then every block that comes and is earlier.
    fn ring(&self, rank: usize) -> (f64, Vec<f64>) {
        let (rows, active) = (self.layouts[rank].rows, self.layouts.len());
        let step = |step: usize| match (rank + active - step) % active {
            holds if holds < rank => pairs(rows, self.layouts[holds].rows),
            _ => 0.0,
        };
        (causal_pairs(rows), (1..active).map(step).collect())
    }

    /// Pairs of full, star and APB attention: what the rank has itself, and what comes from others.
    fn blocks(&self, layout: &RankLayout) -> (f64, Vec<f64>) {
        let (mut own, mut passing) = (causal_pairs(layout.anchor.len()), 0.0);
        for (index, host) in layout.hosts.clone().enumerate() {
            let (local, probe) = (layout.locals[index].len(), layout.probes[index].len());
            let anchor = if host > 0 { layout.anchor.len() } else { 0 };
            own += pairs(local + probe, anchor) + causal_pairs(local) + pairs(probe, local) + causal_pairs(probe);
            passing += pairs(local + probe, self.plan.compressed_before(host));
        }
        match (self.is_apart, passing > 0.0) {
            (true, true) => (own, vec![passing]),
            _ => (own + passing, Vec::new()),
        }
    }

    /// FLOPs of the scores, and bytes of choosing and copying: for a rank whose hosts pass something on.
    fn selection(&self, layout: &RankLayout) -> (f64, f64) {
        let (plan, shape) = (self.plan, self.shape);
        let passes = |host: &usize| plan.hosts[*host].compressed > 0;
        let Some(last) = layout.hosts.clone().rev().find(passes) else { return (0.0, 0.0) };
        let scored = layout.locals[last - layout.hosts.start].end;
        let probes: usize = layout.probes.iter().map(ExactSizeIterator::len).sum();
        let flops = match plan.selector {
            Selector::RetainingHead => product(scored, shape.head_weights()),
            Selector::QueryAware => pairs(probes, scored) * 2.0 * shape.q_width() as f64,
            Selector::Random { .. } | Selector::None => 0.0,
        };
        let chosen: usize = layout.hosts.clone().map(|host| plan.hosts[host].compressed).sum();
        let copied = 2 * chosen * 2 * shape.kv_width() * shape.element_bytes;
        // Keys once for each host that the query scores.
        let keys = match plan.selector {
            Selector::QueryAware => layout.hosts.clone().filter(passes).count() * scored * shape.kv_width(),
            _ => 0,
        };
        (flops, (copied + keys * shape.element_bytes + 8 * scored * shape.kv_heads) as f64)
    }
}
