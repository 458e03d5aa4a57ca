//! The weights of a model on one device, as the layer loop uses them.
//!
//! Invariant: shapes agree with the [`ModelSpec`] they were loaded for; every element is finite.

use super::ModelSpec;
use crate::backend::{Backend, Head};

/// All weights of a model, on the device of `B`. Linear layers are `[output features, input features]`.
pub struct Weights<B: Backend> {
    /// `[vocab, hidden]`.
    pub embedding: B::Weight,
    /// One a layer.
    pub layers: Vec<LayerWeights<B>>,
    /// `[1, hidden]`: the norm before the language-model head.
    pub final_norm: B::Weight,
    /// `[vocab, hidden]`; absent if the head is the embedding.
    pub head: Option<B::Weight>,
    /// Trained retaining heads, one a layer; absent if the model has none.
    pub retaining_heads: Option<Vec<RetainingHead<B>>>,
}

/// One transformer layer.
pub struct LayerWeights<B: Backend> {
    /// `[1, hidden]`: RMSNorm before attention.
    pub attention_norm: B::Weight,
    /// `[(heads + 2 kv_heads) * head_dim, hidden]`: q, k and v stacked.
    pub qkv: B::Weight,
    /// `[1, (heads + 2 kv_heads) * head_dim]`.
    pub qkv_bias: Option<B::Weight>,
    /// `[hidden, heads * head_dim]`.
    pub o: B::Weight,
    /// `[1, hidden]`.
    pub o_bias: Option<B::Weight>,
    /// `[1, hidden]`: RMSNorm before the MLP.
    pub mlp_norm: B::Weight,
    /// `[2 * intermediate, hidden]`: gate and up stacked.
    pub gate_up: B::Weight,
    /// `[hidden, intermediate]`.
    pub down: B::Weight,
}

/// The retaining head of one layer: scores `w2 · silu(w1 · qkv)` before RoPE.
pub struct RetainingHead<B: Backend> {
    /// Hidden units.
    pub width: usize,
    /// `[width, (heads + 2 kv_heads) * head_dim]`.
    pub w1: B::Weight,
    /// `[kv_heads, width]`.
    pub w2: B::Weight,
}

impl<B: Backend> Weights<B> {
    /// Final norm, of the spec's epsilon, and language-model head: its own, or the embedding where they are tied.
    pub fn language_model_head(&self, spec: &ModelSpec) -> Head<'_, B::Weight> {
        let weights = self.head.as_ref().unwrap_or(&self.embedding);
        Head { norm: &self.final_norm, epsilon: spec.epsilon, weights }
    }
}
