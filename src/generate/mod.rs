//! Choosing tokens: sampling, stop rules, grammar-constrained decoding.
//!
//! Invariant: works on logits and token ids on the host; knows no device and no rank.

pub mod constraint;
pub mod generator;
pub mod grammar;
pub mod sampler;
pub mod stop;
pub mod vocabulary;

use serde::{Deserialize, Serialize};

/// How tokens are chosen and when to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationOptions {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// 0: greedy.
    pub temperature: f32,
    /// Nucleus; 1: everything.
    pub top_p: f32,
    /// Seed of the sampler.
    pub seed: u64,
    /// Strings that end the output (not part of it).
    pub stop: Vec<String>,
    /// JSON Schema the output has to follow, token by token.
    pub schema: Option<serde_json::Value>,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self { max_new_tokens: 512, temperature: 0.0, top_p: 1.0, seed: 0, stop: Vec::new(), schema: None }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// A stop token.
    EndOfText,
    /// A stop string.
    StopString,
    /// The grammar was complete.
    GrammarComplete,
    /// `max_new_tokens` were generated: the output is cut short.
    Length,
}
