//! Shapes of published models, by name. Figures are those of their `config.json`.
//!
//! Invariant: positions are not limited, so that lengths beyond a model's own can be measured; RoPE is unscaled, which changes no cost.

use clap::ValueEnum;

#[cfg(feature = "cuda")]
use crate::backend::HeadShape;
#[cfg(feature = "cuda")]
use crate::model::{ModelSpec, Rope};

/// Models whose shapes are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ShapeName {
    /// 32 layers, 32 heads and 8 KV heads of 128.
    #[value(name = "llama-3.1-8b")]
    Llama31,
    /// 48 layers, 40 heads and 8 KV heads of 128, biases.
    #[value(name = "qwen2.5-14b")]
    Qwen25,
    /// 60 layers, 56 heads and 8 KV heads of 128.
    #[value(name = "yi-34b")]
    Yi34,
}

#[cfg(feature = "cuda")]
impl ShapeName {
    /// The name as it is given on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llama31 => "llama-3.1-8b",
            Self::Qwen25 => "qwen2.5-14b",
            Self::Yi34 => "yi-34b",
        }
    }

    /// The shapes.
    pub fn spec(self) -> ModelSpec {
        let (layers, hidden, intermediate, heads, vocab, theta, epsilon) = match self {
            Self::Llama31 => (32, 4096, 14_336, 32, 128_256, 5e5f64, 1e-5),
            Self::Qwen25 => (48, 5120, 13_824, 40, 152_064, 1e6, 1e-6),
            Self::Yi34 => (60, 7168, 20_480, 56, 64_000, 1e7, 1e-5),
        };
        let head_dim = 128;
        let inv_freq =
            (0..head_dim / 2).map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(head_dim)) as f32).collect();
        ModelSpec {
            family: if self == Self::Qwen25 { "qwen2" } else { "llama" }.to_owned(),
            layers,
            hidden,
            intermediate,
            shape: HeadShape { heads, kv_heads: 8, head_dim: head_dim as usize },
            vocab,
            epsilon,
            rope: Rope { inv_freq, scale: 1.0 },
            max_positions: u32::MAX as usize,
            qkv_bias: self == Self::Qwen25,
            o_bias: false,
            tied_embeddings: false,
            stop_tokens: Vec::new(),
        }
    }
}
