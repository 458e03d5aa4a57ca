//! Which token is chosen from a row of logits.
//!
//! Invariant: the same logits, options and seed give the same tokens; of equal logits the lowest id wins.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::GenerationOptions;

/// Greedy, or a draw from the tempered nucleus.
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    random: StdRng,
}

impl Sampler {
    /// Takes temperature, nucleus and seed from the options.
    pub fn new(options: &GenerationOptions) -> Self {
        Self { temperature: options.temperature, top_p: options.top_p, random: StdRng::seed_from_u64(options.seed) }
    }

    /// Whether the likeliest token is always chosen.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0
    }

    /// What the next token is chosen by, where somebody else has the logits; takes the next number of the draw.
    pub fn choice(&mut self) -> Choice {
        let draw = if self.is_greedy() { 0.0 } else { self.random.random() };
        Choice { temperature: self.temperature, top_p: self.top_p, draw }
    }

    /// Chooses from `logits`; forbidden tokens are negative infinity. `None` if every token is forbidden.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        self.choice().of(logits)
    }
}

/// How one token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// 0: the likeliest token.
    pub temperature: f32,
    /// Share of the probability that the nucleus holds at least.
    pub top_p: f32,
    /// Where in the nucleus, in the order of the ids; in 0..1.
    pub draw: f32,
}

impl Choice {
    /// The token; `None` if every one is forbidden.
    pub fn of(&self, logits: &[f32]) -> Option<u32> {
        let best = argmax(logits)?;
        if self.temperature <= 0.0 {
            return Some(best);
        }
        let nucleus = nucleus(logits, logits[best as usize], self.temperature, self.top_p);
        let total: f64 = nucleus.iter().map(|(_, weight)| weight).sum();
        let mut left = f64::from(self.draw) * total;
        for &(token, weight) in &nucleus {
            left -= weight;
            if left < 0.0 {
                return Some(token);
            }
        }
        // Rounding may leave a crumb after the last one.
        nucleus.last().map(|&(token, _)| token)
    }
}

/// The highest logit; of equals the lowest id.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > best.map_or(f32::NEG_INFINITY, |(_, highest)| highest) {
            best = Some((token as u32, logit));
        }
    }
    best.map(|(token, _)| token)
}

/// The most probable tokens, as few as hold `top_p` of the probability, and all that are as probable as the last of them; with unnormalised weights,
/// in the order of their ids.
fn nucleus(logits: &[f32], highest: f32, temperature: f32, top_p: f32) -> Vec<(u32, f64)> {
    let weight = |logit: f32| (f64::from(logit - highest) / f64::from(temperature)).exp();
    let finite = logits.iter().enumerate().filter(|(_, logit)| logit.is_finite());
    let mut tokens: Vec<(u32, f64)> = finite.map(|(token, &logit)| (token as u32, weight(logit))).collect();
    if top_p >= 1.0 {
        return tokens;
    }
    let mut weights: Vec<f64> = tokens.iter().map(|(_, weight)| *weight).collect();
    weights.sort_by(|a, b| b.total_cmp(a));
    let enough = weights.iter().sum::<f64>() * f64::from(top_p);
    let mut held = 0.0;
    let last = weights.iter().find(|weight| {
        held += **weight;
        held >= enough
    });
    let least = last.copied().unwrap_or(0.0);
    tokens.retain(|(_, weight)| *weight >= least);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(&GenerationOptions { temperature, top_p, seed, ..GenerationOptions::default() })
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(sampler(0.0, 1.0, 0).choose(&[1.0, 3.0, 3.0, f32::NEG_INFINITY]), Some(1));
    }

    #[test]
    fn nothing_is_chosen_where_everything_is_forbidden() {
        assert_eq!(sampler(1.0, 0.5, 0).choose(&[f32::NEG_INFINITY; 3]), None);
    }

    #[test]
    fn draws_follow_the_tempered_distribution() {
        // Probabilities 1/7, 2/7 and 4/7 at temperature 2.
        let logits = [0.0, 2.0 * 2f32.ln(), 2.0 * 4f32.ln()];
        let mut sampler = sampler(2.0, 1.0, 7);
        let mut counts = [0f64; 3];
        for _ in 0..7000 {
            counts[sampler.choose(&logits).unwrap() as usize] += 1.0;
        }
        for (count, expected) in counts.iter().zip([1000.0, 2000.0, 4000.0]) {
            assert!((count - expected).abs() < 150.0, "{counts:?}");
        }
    }

    #[test]
    fn the_nucleus_is_the_least_that_holds_top_p() {
        let logits = [1f32, 4.0, 3.0, 2.0].map(f32::ln);
        let kept = |top_p| nucleus(&logits, logits[1], 1.0, top_p).iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(kept(0.05), [1]);
        assert_eq!(kept(0.41), [1, 2]);
        assert_eq!(kept(0.89), [1, 2, 3]);
        assert_eq!(kept(0.95), [0, 1, 2, 3]);
    }

    #[test]
    fn tokens_as_probable_as_the_last_belong_to_the_nucleus() {
        let kept = nucleus(&[0.0, 1.0, 1.0, 1.0], 1.0, 1.0, 0.5);
        assert_eq!(kept.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn a_seed_repeats_its_tokens() {
        let logits: Vec<f32> = (0..50).map(|token| (token as f32).sin()).collect();
        let draw = |seed| {
            let mut sampler = sampler(1.0, 0.9, seed);
            (0..40).map(|_| sampler.choose(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
