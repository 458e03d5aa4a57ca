//! What documents come, and when.
//!
//! Invariant: all that is random follows from one seed.

use std::str::FromStr;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Documents of one length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// Tokens of the context.
    pub tokens: usize,
    /// How often they come, relative to the other parts.
    pub weight: f64,
}

/// Lengths and how often each comes: `4K:30,32K:50,128K:20`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// The lengths, ascending; not empty.
    pub parts: Vec<Part>,
}

/// A mix that can not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MixError {
    /// There is no part.
    #[error("a mix has at least one part, such as 32K:50")]
    Empty,
    /// A part that is none.
    #[error("'{part}' is no part of a mix; a length and how often it comes are expected, such as 32K:50")]
    Part { part: String },
}

/// `4096`, `32K`, `1M`: a number of tokens, units of 1,024.
pub fn tokens(text: &str) -> Option<usize> {
    let text = text.trim();
    let unit = match text.chars().last()?.to_ascii_lowercase() {
        'k' => 1 << 10,
        'm' => 1 << 20,
        _ => 1,
    };
    let digits = if unit == 1 { text } else { &text[..text.len() - 1] };
    digits.parse::<usize>().ok()?.checked_mul(unit).filter(|tokens| *tokens > 0)
}

impl FromStr for Mix {
    type Err = MixError;

    /// Parts are separated by commas or lines; what follows `#` in a line is a comment. Without a weight a part comes once.
    fn from_str(text: &str) -> Result<Self, MixError> {
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
        let parts = lines.flat_map(|line| line.split(',')).map(str::trim).filter(|part| !part.is_empty());
        let part = |text: &str| {
            let (length, weight) = text.split_once(':').unwrap_or((text, "1"));
            let weight = weight.trim().parse().ok().filter(|weight: &f64| weight.is_finite() && *weight > 0.0);
            let part = tokens(length).zip(weight).map(|(tokens, weight)| Part { tokens, weight });
            part.ok_or_else(|| MixError::Part { part: text.to_owned() })
        };
        let mut parts: Vec<Part> = parts.map(part).collect::<Result<_, _>>()?;
        parts.sort_by_key(|part| part.tokens);
        if parts.is_empty() { Err(MixError::Empty) } else { Ok(Self { parts }) }
    }
}

impl Mix {
    /// Part of all documents that come in each of the lengths.
    pub fn shares(&self) -> Vec<f64> {
        let all: f64 = self.parts.iter().map(|part| part.weight).sum();
        self.parts.iter().map(|part| part.weight / all).collect()
    }

    /// So many documents, each with the index of its part and the second in which it comes.
    pub fn documents(&self, count: usize, arrivals: Arrivals, seed: u64) -> Vec<(usize, f64)> {
        let mut random = StdRng::seed_from_u64(seed);
        let shares = self.shares();
        let mut now = 0.0;
        let mut document = || {
            let mut draw: f64 = random.random();
            let found = shares.iter().position(|share| {
                draw -= share;
                draw < 0.0
            });
            if let Arrivals::Random { per_s } = arrivals {
                // The time between two is exponential; 1 - draw is never 0.
                now -= (1.0 - random.random::<f64>()).ln() / per_s;
            }
            (found.unwrap_or(shares.len() - 1), now)
        };
        (0..count).map(|_| document()).collect()
    }
}

/// When documents come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// All at the beginning.
    AtOnce,
    /// One by one, independently of each other, so many a second on average.
    Random { per_s: f64 },
}
