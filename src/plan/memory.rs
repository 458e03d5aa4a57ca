//! How much memory a plan needs on each rank, beyond the weights.
//!
//! Invariant: an upper bound of what the layer loop allocates; a test counts its allocations and compares.

use super::{AttentionMode, PrefillPlan};

/// Query tokens that go through the layers at a time, so that a long query needs no more memory than a short one.
pub const QUERY_CHUNK: usize = 256;

/// Parts of the vocabulary are rounded up to so many tokens, as by the backends' `even_part`.
const PART_TOKENS: usize = 8;

/// Rows of a pass at most: a chunk of a query, or a token of each of `at_once` sequences.
pub fn pass_rows(at_once: usize) -> usize {
    QUERY_CHUNK.max(at_once)
}

/// What of a model decides about memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Layers.
    pub layers: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Bytes of an activation.
    pub element_bytes: usize,
    /// Bytes of a row of keys and its values in one layer, as they are kept for decode.
    pub kept_row_bytes: usize,
    /// What a rank's backend may use for itself (chunks of the MLP, partial sums), in bytes.
    pub scratch_bytes: u64,
}

impl Footprint {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
    fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
    /// Bytes of matrices of `elements` activations in all.
    fn activations(&self, elements: usize) -> u64 {
        elements as u64 * self.element_bytes as u64
    }
    /// Bytes that a rank holds whatever it works on: buffers of passes in which `at_once` sequences generate, and what its backend uses for itself.
    pub fn fixed_memory(&self, ranks: usize, at_once: usize) -> u64 {
        let rows = pass_rows(at_once);
        let (stacked, merged) = if ranks > 1 { (rows * ranks, rows) } else { (0, 0) };
        let tokens_of_rank = self.vocab.div_ceil(ranks).next_multiple_of(PART_TOKENS).min(self.vocab);
        let parts = if ranks > 1 { ranks * tokens_of_rank } else { 0 };
        let working = rows * (self.row_elements() + 2 * self.kv_width() + self.hidden);
        self.activations(working + stacked * (self.qkv_width() + self.q_width()) + merged * self.q_width())
            + scores(stacked * (self.heads + self.hidden))
            + scores(at_once * (self.vocab + parts))
            + self.scratch_bytes
    }
    /// Bytes of a row of keys and its values as passing blocks travel in FP8: a code for each element, a scale for each head, whole 16 bytes.
    fn quantized_row_bytes(&self) -> usize {
        (2 * self.kv_width() + 2 * self.kv_heads * size_of::<f32>()).next_multiple_of(16)
    }
    /// Hidden state, its norm, packed q/k/v and the attention's output.
    fn row_elements(&self) -> usize {
        2 * self.hidden + self.qkv_width() + self.q_width()
    }
}

/// Bytes of f32 scores.
fn scores(count: usize) -> u64 {
    4 * count as u64
}

impl PrefillPlan {
    /// Bytes that one of `ranks` ranks needs at most for this plan and `new_tokens` generated tokens, with no other sequence beside it.
    pub fn memory_of_rank(&self, rank: usize, ranks: usize, new_tokens: usize, model: &Footprint) -> u64 {
        let own = self.cache_memory(rank, ranks, new_tokens, model) + self.prefill_memory(rank, ranks, model);
        own + model.fixed_memory(ranks, 1)
    }

    /// Bytes that all ranks need together, where they share one memory.
    pub fn memory(&self, ranks: usize, new_tokens: usize, model: &Footprint) -> u64 {
        (0..ranks).map(|rank| self.memory_of_rank(rank, ranks, new_tokens, model)).sum()
    }

    /// Rows the last host's cache has to hold beyond its local block: the query, and what is generated.
    pub fn cache_tail(&self, new_tokens: usize) -> usize {
        self.query + new_tokens
    }

    /// Bytes of keys and values that a rank keeps until the sequence ends.
    pub fn cache_memory(&self, rank: usize, ranks: usize, new_tokens: usize, model: &Footprint) -> u64 {
        let tail = if rank == self.last_rank(ranks) { self.cache_tail(new_tokens) } else { 0 };
        (model.layers * model.kept_row_bytes * (self.kept_tokens(rank, ranks) + tail).max(1)) as u64
    }

    /// Bytes that a rank needs until the context is through all layers, and no longer.
    pub fn prefill_memory(&self, rank: usize, ranks: usize, model: &Footprint) -> u64 {
        let rows = self.layout(rank, ranks).rows.max(1);
        let all_rows = (self.layout(rank, ranks).rows + self.query_rows()).max(1);
        let kv = 2 * model.kv_width();
        let working = all_rows * (model.row_elements() + kv);
        let passing = kv * self.compressed();
        let quantized = if self.passes_in_fp8() { self.compressed() * model.quantized_row_bytes() } else { 0 };
        let selection = if self.compressed() > 0 { scores(rows * model.kv_heads) } else { 0 };
        let most_kept = self.hosts_of(rank, ranks).iter().map(|host| self.hosts[*host].kept_rows()).max().unwrap_or(0);
        let (evicted, scored) =
            if self.evicts() { (kv * most_kept.max(1), scores(rows * model.kv_heads)) } else { (0, 0) };
        // What comes from other ranks is attended to apart, and merged by its log-sum-exps.
        let is_alone = self.active_ranks(ranks) == 1;
        let is_ring = self.mode == AttentionMode::Ring && !is_alone;
        // What is attended to, what is sent and what comes.
        let rotating = if is_ring { 3 * kv * self.longest_rank(ranks) } else { 0 };
        let exchanged = match self.mode {
            AttentionMode::Ulysses if !is_alone => self.exchanged_elements(rank, ranks, model),
            _ => 0,
        };
        let is_apart = is_ring || (ranks > 1 && self.compressed() > 0 && self.execution.overlap);
        let partial = if is_apart { rows * model.q_width() } else { 0 };
        let log_sums = if is_apart { 2 * scores(rows * model.heads) } else { 0 };
        model.activations(working + passing + rotating + exchanged + partial + evicted)
            + log_sums
            + selection
            + scored
            + quantized as u64
    }

    /// Queries, keys and values by head: of the rank's tokens as they leave, of all tokens as they come, and what attention gives for those.
    fn exchanged_elements(&self, rank: usize, ranks: usize, model: &Footprint) -> usize {
        let group = model.heads / model.kv_heads;
        let leaving = (self.local_tokens(rank, ranks) * model.kv_heads).max(1);
        let coming = (self.context * self.kv_heads_of(rank, ranks, model.kv_heads).len()).max(1);
        model.head_dim * (leaving * (group + 2) + coming * (2 * group + 2))
    }

    /// Context tokens of the rank that has most.
    fn longest_rank(&self, ranks: usize) -> usize {
        (0..self.active_ranks(ranks)).map(|rank| self.local_tokens(rank, ranks)).max().unwrap_or(0)
    }

    fn kept_tokens(&self, rank: usize, ranks: usize) -> usize {
        self.hosts_of(rank, ranks).iter().map(|host| self.hosts[*host].kept_rows()).sum()
    }

    fn local_tokens(&self, rank: usize, ranks: usize) -> usize {
        self.hosts_of(rank, ranks).iter().map(|host| self.hosts[*host].local.len()).sum()
    }
}
