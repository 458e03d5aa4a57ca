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

impl GenerationOptions {
    /// What is wrong with the options, in words.
    pub fn check(&self) -> Result<(), String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(format!("the temperature is {}; it has to be 0 or more", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top_p is {}; it has to be more than 0 and at most 1", self.top_p));
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_mean_nothing_are_named() {
        let with =
            |temperature, top_p| GenerationOptions { temperature, top_p, ..GenerationOptions::default() }.check();
        assert_eq!(with(0.0, 1.0), Ok(()));
        assert_eq!(with(0.7, 0.9), Ok(()));
        for (temperature, top_p, named) in
            [(-1.0, 1.0, "temperature"), (f32::NAN, 1.0, "temperature"), (1.0, 0.0, "top_p"), (1.0, 1.5, "top_p")]
        {
            assert!(with(temperature, top_p).is_err_and(|reason| reason.contains(named)));
        }
    }
}
