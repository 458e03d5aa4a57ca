//! A model directory as published on Hugging Face: `config.json` to [`ModelSpec`], safetensors to weights.
//!
//! Invariant: knows files and shapes; no queue, store, document or plan.

pub mod chat;
mod config;
mod error;
mod load;
mod pieces;
mod random;
mod rope;
mod tensors;
#[cfg(test)]
mod tests;
pub mod tokenizer;
pub mod torch;
pub mod weights;

pub use error::ModelError;
pub use load::HEADS_FILE;
pub use random::RandomMatrix;

use crate::backend::HeadShape;

/// What the layer loop has to know of a model; everything checked, nothing defaulted silently.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `llama` or `qwen2`.
    pub family: String,
    /// Layers.
    pub layers: usize,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Heads.
    pub shape: HeadShape,
    /// Vocabulary rows of the embedding.
    pub vocab: usize,
    /// RMSNorm epsilon.
    pub epsilon: f32,
    /// RoPE.
    pub rope: Rope,
    /// Positions the model is made for.
    pub max_positions: usize,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub o_bias: bool,
    /// The head is the embedding.
    pub tied_embeddings: bool,
    /// Tokens that end generation (from generation_config.json, else config.json).
    pub stop_tokens: Vec<u32>,
}

/// Rotary embedding, scaling worked in.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Radians per position of each pair: `head_dim / 2`.
    pub inv_freq: Vec<f32>,
    /// Factor on sine and cosine (yarn's attention factor; 1 otherwise).
    pub scale: f32,
}
