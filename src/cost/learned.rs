//! What an installation learns from its own jobs: by how much they take longer, or shorter, than predicted.
//!
//! Invariant: factors are means of logarithms, so that twice as long and half as long cancel out; the first observation counts
//! fully, a later one never less than one in [`MEMORY`].

use serde::{Deserialize, Serialize};

/// Observations after which an old one has faded.
pub const MEMORY: u32 = 50;

/// The two parts of an inference that are learned apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Context and query through all layers, until the first token can be chosen.
    Prefill,
    /// The generated tokens.
    Generate,
}

impl Work {
    /// As it is stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Generate => "generate",
        }
    }
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Prefill, Self::Generate];
        all.into_iter().find(|work| work.as_str() == text).ok_or_else(|| format!("'{text}' is no work that is timed"))
    }
}

/// What a rate belongs to: one model on so many devices of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// Digest of the model.
    pub model_digest: String,
    /// The device, in the engine's words.
    pub device: String,
    /// Ranks of the group.
    pub ranks: u32,
}

/// One inference: what was predicted and what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// Where it ran.
    pub place: Place,
    /// What was timed.
    pub work: Work,
    /// Predicted seconds, as [`CostModel`](super::CostModel) said, not corrected.
    pub predicted_s: f64,
    /// Seconds it took.
    pub observed_s: f64,
}

impl Observation {
    /// Logarithm of observed over predicted; `None` where either is no positive number.
    pub fn ln_factor(&self) -> Option<f64> {
        let factor = self.observed_s / self.predicted_s;
        (self.observed_s > 0.0 && factor.is_normal() && factor > 0.0).then(|| factor.ln())
    }
}

/// A learned rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Mean of the logarithms of observed over predicted.
    pub ln_factor: f64,
    /// Their variance.
    pub ln_variance: f64,
    /// How many there were.
    pub observations: u64,
}

impl Rate {
    /// With one more observation.
    pub fn with(rate: Option<Self>, ln_factor: f64) -> Self {
        let Some(Self { ln_factor: mean, ln_variance: variance, observations }) = rate else {
            return Self { ln_factor, ln_variance: 0.0, observations: 1 };
        };
        let weight = (1.0 / (observations + 1) as f64).max(1.0 / f64::from(MEMORY));
        let distance = ln_factor - mean;
        Self {
            ln_factor: mean + weight * distance,
            ln_variance: (1.0 - weight) * (variance + weight * distance * distance),
            observations: observations + 1,
        }
    }
}

/// What is known about one place.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Learned {
    /// Of prefills.
    pub prefill: Option<Rate>,
    /// Of queries and generated tokens.
    pub generate: Option<Rate>,
}

impl Learned {
    /// Observed over predicted, as it is to be expected; 1 before anything was seen.
    pub fn factor(&self, work: Work) -> f64 {
        self.rate(work).map_or(1.0, |rate| rate.ln_factor.exp())
    }

    /// Observed over predicted, as it is hardly ever exceeded: three standard deviations above what is expected. `None` before anything was seen.
    pub fn bound(&self, work: Work) -> Option<f64> {
        self.rate(work).map(|rate| (rate.ln_factor + 3.0 * rate.ln_variance.max(0.0).sqrt()).exp())
    }

    /// Takes in what was seen; nothing if it makes no sense.
    pub fn observe(&mut self, observation: &Observation) {
        if let Some(ln_factor) = observation.ln_factor() {
            let rate = self.slot(observation.work);
            *rate = Some(Rate::with(*rate, ln_factor));
        }
    }

    /// Replaces what is known about one kind of work.
    pub fn set(&mut self, work: Work, rate: Rate) {
        *self.slot(work) = Some(rate);
    }

    fn rate(&self, work: Work) -> Option<Rate> {
        match work {
            Work::Prefill => self.prefill,
            Work::Generate => self.generate,
        }
    }

    fn slot(&mut self, work: Work) -> &mut Option<Rate> {
        match work {
            Work::Prefill => &mut self.prefill,
            Work::Generate => &mut self.generate,
        }
    }
}
