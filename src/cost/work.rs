//! What one layer of a prefill makes a rank do: FLOPs and bytes, counted as the layer loop issues them.
//!
//! Invariant: the anchor is counted once a rank, a causal block by its visible pairs, a probe where the plan has one; a
//! multiplication with its addition is 2 FLOPs. A test counts what the layer loop really asks of a backend and compares.

use std::ops::Range;

use crate::plan::{AttentionMode, PrefillPlan, RankLayout, Selector};

use super::shape::ModelShape;

/// One layer of all ranks, and what travels between them in it.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWork {
    /// Of each rank; those without hosts have the query at most.
    pub ranks: Vec<RankWork>,
    /// What travels.
    pub exchange: Exchange,
    /// Whether it travels while attention over what a rank has is computed.
    pub overlap: bool,
}

/// What travels between the ranks in one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Exchange {
    /// Nothing.
    Nothing,
    /// All compressed blocks come to every rank, in bytes of all together.
    Gather { bytes: f64 },
    /// So many times rows of so many bytes at most go from rank to rank.
    Rotate { bytes: f64, steps: usize },
    /// Queries, keys and values go to the ranks of their heads, and what attention gives back: bytes of the rank that sends most.
    Swap { to_heads_bytes: f64, back_bytes: f64 },
}

/// One layer of one rank. In the last one the context ends after its keys and values are stored.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RankWork {
    /// Rows of anchor, local blocks, probes, and of a query that goes with its context.
    pub rows: usize,
    /// Projection to queries, keys and values.
    pub qkv_flops: f64,
    /// Retaining heads, or the scores of the query's tokens: for what is passed on, and for what is kept if that is not all.
    pub scoring_flops: f64,
    /// Of those, what the last layer has too: for what is kept.
    pub last_scoring_flops: f64,
    /// Attention that needs nothing of other ranks.
    pub own_attention_flops: f64,
    /// Attention to what other ranks send, in the order in which it comes: one piece, or one a step of the ring.
    pub late_attention_flops: Vec<f64>,
    /// The query's attention over what the rank keeps, which is read for it; also in the last layer.
    pub query_attention_flops: f64,
    /// Bytes of the keys and values that it reads.
    pub query_bytes: f64,
    /// Output projection.
    pub o_flops: f64,
    /// MLP.
    pub ffn_flops: f64,
    /// The query's part of both, which is all that the last layer has of them.
    pub last_o_flops: f64,
    /// As above, of the MLP.
    pub last_ffn_flops: f64,
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
    /// FLOPs of a layer that is not the last, the selection included.
    pub fn flops(&self) -> f64 {
        let late: f64 = self.late_attention_flops.iter().sum();
        let attention = self.own_attention_flops + late + self.query_attention_flops;
        self.qkv_flops + self.scoring_flops + attention + self.o_flops + self.ffn_flops
    }

    /// FLOPs of the last layer.
    pub fn last_flops(&self) -> f64 {
        self.qkv_flops + self.last_scoring_flops + self.query_attention_flops + self.last_o_flops + self.last_ffn_flops
    }
}

impl LayerWork {
    /// One layer of `plan` on `ranks` ranks.
    pub fn of(plan: &PrefillPlan, ranks: usize, shape: &ModelShape) -> Self {
        let ranks = ranks.max(1);
        let layouts: Vec<RankLayout> = (0..ranks).map(|rank| plan.layout(rank, ranks)).collect();
        let count = Count { plan, shape, layouts: &layouts };
        let exchange = count.exchange();
        let ranks = (0..ranks).map(|rank| count.rank(rank, exchange)).collect();
        Self { ranks, exchange, overlap: plan.execution.overlap }
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
    /// Of all ranks, idle ones too.
    layouts: &'a [RankLayout],
}

impl Count<'_> {
    /// Whether only one rank has anything of the context.
    fn is_alone(&self) -> bool {
        self.plan.active_ranks(self.layouts.len()) == 1
    }

    fn exchange(&self) -> Exchange {
        let (plan, shape) = (self.plan, self.shape);
        let bytes = |elements: usize| (elements * shape.element_bytes) as f64;
        let longest = self.layouts.iter().map(|layout| layout.rows).max().unwrap_or(0);
        match plan.mode {
            _ if self.is_alone() => Exchange::Nothing,
            AttentionMode::Ring => {
                Exchange::Rotate { bytes: bytes(longest * 2 * shape.kv_width()), steps: self.ring_steps() }
            }
            AttentionMode::Ulysses => Exchange::Swap {
                to_heads_bytes: bytes(longest * shape.qkv_width()),
                back_bytes: bytes(longest * shape.q_width()),
            },
            _ if plan.compressed() == 0 => Exchange::Nothing,
            _ if plan.passes_in_fp8() => {
                // A code for each element, an f32 scale for each row and head.
                let row = 2 * shape.kv_width() + 2 * shape.kv_heads * size_of::<f32>();
                Exchange::Gather { bytes: (plan.compressed() * row) as f64 }
            }
            _ => Exchange::Gather { bytes: bytes(plan.compressed() * 2 * shape.kv_width()) },
        }
    }

    fn rank(&self, rank: usize, exchange: Exchange) -> RankWork {
        let (layout, shape) = (&self.layouts[rank], self.shape);
        let (query, local) = (self.plan.query_rows(), self.kept_rows(layout));
        let (rows, context_rows) = (layout.rows + query, layout.rows);
        let bytes = |elements: usize| (elements * shape.element_bytes) as f64;
        // Read and written.
        let norm = 2.0 * bytes(rows * shape.hidden);
        let rope = 2.0 * bytes(rows * shape.qkv_width());
        let is_last = rank == self.plan.last_rank(self.layouts.len());
        let tail = if is_last { query } else { 0 };
        let kept = ((local + tail) * (2 * shape.kv_width() * shape.element_bytes + shape.kept_row_bytes)) as f64;
        let query_pairs = pairs(query, local) + causal_pairs(tail);
        let (own, late) = match (self.plan.mode, exchange) {
            (AttentionMode::Ring, Exchange::Rotate { steps, .. }) => self.ring(rank, steps),
            (AttentionMode::Ulysses, _) => (self.ulysses(rank), Vec::new()),
            (AttentionMode::Ring, _) => (self.pairs_over(rank, rank), Vec::new()),
            (_, Exchange::Gather { .. }) if self.plan.execution.overlap => self.blocks(layout),
            _ => {
                let (own, passing) = self.blocks(layout);
                (own + passing.iter().sum::<f64>(), Vec::new())
            }
        };
        let pair_flops = 4.0 * shape.q_width() as f64;
        let late_rows = if late.is_empty() { 0 } else { context_rows };
        // By head and back: what leaves and what returns is copied, read and written.
        let stacked = match exchange {
            Exchange::Swap { .. } => 2.0 * bytes(context_rows * (shape.qkv_width() + shape.q_width())),
            _ => 0.0,
        };
        let (scoring_flops, selection_bytes) = self.selection(layout);
        // What is kept is chosen by heads of its own, over all local rows.
        let evicting = if self.plan.evicts() { layout.local_rows().end } else { 0 };
        let last_scoring_flops = product(evicting, shape.head_weights());
        RankWork {
            rows,
            qkv_flops: product(rows, shape.hidden * shape.qkv_width()),
            scoring_flops: scoring_flops + last_scoring_flops,
            last_scoring_flops,
            own_attention_flops: pair_flops * own,
            late_attention_flops: late.into_iter().map(|pairs| pair_flops * pairs).collect(),
            query_attention_flops: pair_flops * query_pairs,
            query_bytes: if query > 0 { ((local + tail) * shape.kept_row_bytes) as f64 } else { 0.0 },
            o_flops: product(rows, shape.hidden * shape.q_width()),
            ffn_flops: product(rows, 3 * shape.hidden * shape.intermediate),
            last_o_flops: product(query, shape.hidden * shape.q_width()),
            last_ffn_flops: product(query, 3 * shape.hidden * shape.intermediate),
            before_bytes: norm + rope + kept + stacked,
            after_bytes: norm,
            selection_bytes,
            merge_bytes: 3.0 * bytes(late_rows * shape.q_width()) + 8.0 * (late_rows * shape.heads) as f64,
        }
    }

    /// Pairs of a ring's rank: what it has itself, then what of the rows that come with every step is earlier.
    fn ring(&self, rank: usize, steps: usize) -> (f64, Vec<f64>) {
        let ranks = self.layouts.len();
        let held = |step: usize| (rank + ranks - step) % ranks;
        (self.pairs_over(rank, rank), (1..=steps).map(|step| self.pairs_over(rank, held(step))).collect())
    }

    /// Steps until every rank has had all that it has to see.
    fn ring_steps(&self) -> usize {
        let ranks = self.layouts.len();
        let needed = |step: usize| (0..ranks).any(|rank| self.pairs_over(rank, (rank + ranks - step) % ranks) > 0.0);
        (1..ranks).rev().find(|step| needed(*step)).unwrap_or(0)
    }

    /// Pairs of one rank's rows and what of another rank's is no later.
    fn pairs_over(&self, rank: usize, other: usize) -> f64 {
        let (layout, held) = (&self.layouts[rank], &self.layouts[other]);
        let of_host = |(host, local): (&usize, &Range<usize>)| {
            let own = if rank == other { causal_pairs(local.len()) } else { 0.0 };
            own + pairs(local.len(), held.rows_before(*host).len())
        };
        layout.hosts.iter().zip(&layout.locals).map(of_host).sum()
    }

    /// Pairs of the whole context, for the part of the heads that is the rank's.
    fn ulysses(&self, rank: usize) -> f64 {
        if self.is_alone() {
            return self.pairs_over(rank, rank);
        }
        let heads = self.plan.kv_heads_of(rank, self.layouts.len(), self.shape.kv_heads).len();
        causal_pairs(self.plan.context) * heads as f64 / self.shape.kv_heads as f64
    }

    /// Pairs of full, star and APB attention: what needs no passing block, and (if there is one) what does.
    fn blocks(&self, layout: &RankLayout) -> (f64, Vec<f64>) {
        let (mut own, mut passing) = (causal_pairs(layout.anchor.len()), 0.0);
        for (index, host) in layout.hosts.iter().copied().enumerate() {
            let (local, probe) = (layout.locals[index].len(), layout.probes[index].len());
            let anchor = if host > 0 { layout.anchor.len() } else { 0 };
            own += pairs(local + probe, anchor) + causal_pairs(local) + pairs(probe, local) + causal_pairs(probe);
            passing += pairs(local + probe, self.plan.compressed_before(host));
        }
        (own, if passing > 0.0 { vec![passing] } else { Vec::new() })
    }

    /// Rows of a rank that are kept for the query and what is generated.
    fn kept_rows(&self, layout: &RankLayout) -> usize {
        layout.hosts.iter().map(|host| self.plan.hosts[*host].kept_rows()).sum()
    }

    /// FLOPs of the scores, and bytes of choosing and copying: for a rank whose hosts pass something on.
    fn selection(&self, layout: &RankLayout) -> (f64, f64) {
        let (plan, shape) = (self.plan, self.shape);
        let passes = |host: &usize| plan.hosts[*host].compressed > 0;
        let Some(last) = layout.hosts.iter().rposition(passes) else { return (0.0, 0.0) };
        let scored = layout.locals[last].end;
        let probes: usize = layout.probes.iter().map(ExactSizeIterator::len).sum();
        let flops = match plan.selector {
            Selector::RetainingHead => product(scored, shape.head_weights()),
            Selector::QueryAware => pairs(probes, scored) * 2.0 * shape.q_width() as f64,
            Selector::Random { .. } | Selector::None => 0.0,
        };
        let chosen: usize = layout.hosts.iter().map(|host| plan.hosts[*host].compressed).sum();
        let copied = 2 * chosen * 2 * shape.kv_width() * shape.element_bytes;
        // Keys once for each host that the query scores.
        let keys = match plan.selector {
            Selector::QueryAware => layout.hosts.iter().filter(|host| passes(host)).count() * scored * shape.kv_width(),
            _ => 0,
        };
        (flops, (copied + keys * shape.element_bytes + 8 * scored * shape.kv_heads) as f64)
    }
}
