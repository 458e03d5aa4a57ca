//! A model's sizes, as far as they decide about time and memory.
//!
//! Invariant: sizes alone; no weight and no name.

use serde::{Deserialize, Serialize};

use crate::plan::Footprint;

/// Sizes of a model and of how a device keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
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
    /// Whether embedding and language-model head are one matrix.
    pub tied_embeddings: bool,
    /// Hidden width of a retaining head; 0 without.
    pub head_width: usize,
    /// Bytes of an activation, and of a weight.
    pub element_bytes: usize,
    /// Bytes of a row of keys and its values in one layer, as they are kept for decode.
    pub kept_row_bytes: usize,
    /// What the backend may use for itself, in bytes.
    pub scratch_bytes: u64,
}

impl ModelShape {
    /// Elements of a row of queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a row of keys, or of values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of a packed row of queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Elements of the matrices of one layer that every row is multiplied by.
    pub fn layer_weights(&self) -> usize {
        self.hidden * (self.qkv_width() + self.q_width() + 3 * self.intermediate)
    }

    /// Elements of one layer's retaining head.
    pub fn head_weights(&self) -> usize {
        self.head_width * (self.qkv_width() + self.kv_heads)
    }

    /// Bytes of all weights on a rank.
    pub fn weight_bytes(&self) -> u64 {
        let embeddings = if self.tied_embeddings { 1 } else { 2 } * self.vocab * self.hidden;
        let layers = self.layers * (self.layer_weights() + self.head_weights() + 2 * self.hidden);
        ((embeddings + layers) * self.element_bytes) as u64
    }

    /// Bytes of weights that are read for a pass of few rows: all layers and the language-model head.
    pub fn pass_bytes(&self) -> u64 {
        ((self.layers * self.layer_weights() + self.vocab * self.hidden) * self.element_bytes) as u64
    }

    /// What decides about a plan's memory.
    pub fn footprint(&self) -> Footprint {
        Footprint {
            layers: self.layers,
            hidden: self.hidden,
            intermediate: self.intermediate,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab: self.vocab,
            element_bytes: self.element_bytes,
            kept_row_bytes: self.kept_row_bytes,
            scratch_bytes: self.scratch_bytes,
        }
    }
}

/// Rows that the MLP of a GPU takes at a time; what it holds meanwhile is most of the scratch.
const MLP_ROWS: usize = 4096;

impl ModelShape {
    /// A published model (the figures of its `config.json`) as a GPU keeps it: bf16, keys and values too, with retaining heads of `head_width` hidden units.
    pub fn published(name: &str, head_width: usize) -> Option<Self> {
        let (layers, hidden, intermediate, heads, vocab) = match name {
            "llama-3.1-8b" => (32, 4096, 14_336, 32, 128_256),
            "qwen2.5-14b" => (48, 5120, 13_824, 40, 152_064),
            "yi-34b" => (60, 7168, 20_480, 56, 64_000),
            _ => return None,
        };
        let (kv_heads, head_dim, element_bytes) = (8, 128, 2);
        Some(Self {
            layers,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            tied_embeddings: false,
            head_width,
            element_bytes,
            kept_row_bytes: 2 * kv_heads * head_dim * element_bytes,
            scratch_bytes: (MLP_ROWS * 3 * intermediate * element_bytes) as u64,
        })
    }

    /// With keys and values kept in FP8, a byte of scale for every row and head.
    pub fn kept_in_fp8(self) -> Self {
        let scales = 2 * self.kv_heads;
        Self { kept_row_bytes: 2 * self.kv_width() + scales, ..self }
    }
}
