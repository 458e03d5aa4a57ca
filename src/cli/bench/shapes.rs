//! Shapes of published models, by name.
//!
//! Invariant: positions are not limited, so that lengths beyond a model's own can be measured; RoPE is unscaled, which changes no cost.

use clap::ValueEnum;

#[cfg(feature = "cuda")]
use crate::backend::HeadShape;
use crate::cost::ModelShape;
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

impl ShapeName {
    /// The name as it is given on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Llama31 => "llama-3.1-8b",
            Self::Qwen25 => "qwen2.5-14b",
            Self::Yi34 => "yi-34b",
        }
    }

    /// The sizes that decide about time and memory on a GPU.
    pub fn cost_shape(self, head_width: usize, fp8_kept: bool) -> ModelShape {
        let shape = ModelShape::published(self.as_str(), head_width).expect("every name here is of a published shape");
        match fp8_kept {
            true => shape.kept_in_fp8(),
            false => shape,
        }
    }

    /// The shapes.
    #[cfg(feature = "cuda")]
    pub fn spec(self) -> ModelSpec {
        let ModelShape { layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, tied_embeddings, .. } =
            self.cost_shape(0, false);
        let (theta, epsilon) = match self {
            Self::Llama31 => (5e5f64, 1e-5),
            Self::Qwen25 => (1e6, 1e-6),
            Self::Yi34 => (1e7, 1e-5),
        };
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64) as f32;
        ModelSpec {
            family: if self == Self::Qwen25 { "qwen2" } else { "llama" }.to_owned(),
            layers,
            hidden,
            intermediate,
            shape: HeadShape { heads, kv_heads, head_dim },
            vocab,
            epsilon,
            rope: Rope { inv_freq: (0..head_dim / 2).map(frequency).collect(), scale: 1.0 },
            max_positions: u32::MAX as usize,
            qkv_bias: self == Self::Qwen25,
            o_bias: false,
            tied_embeddings,
            stop_tokens: Vec::new(),
        }
    }
}
