//! Rotary embeddings: base frequencies, and how they are scaled for contexts longer than the one trained first.
//!
//! Formulas: linear, Chen et al. 2023 (arXiv 2306.15595); yarn, Peng et al. 2023 (arXiv 2309.00071); llama3, the Llama 3.1 release.
//!
//! Invariant: computed in f64 and rounded once.

use std::f64::consts::TAU;

use serde_json::Value;

use super::config::Config;
use super::{ModelError, Rope};

const DEFAULT_THETA: f64 = 10_000.0;

/// Reads `rope_parameters` (new) or `rope_theta` with `rope_scaling` (old).
pub(super) fn read(config: &Config, head_dim: usize, max_positions: usize) -> Result<Rope, ModelError> {
    let scaling = match config.section("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.section("rope_scaling")?,
    };
    let partial = |section: &Config| section.number("partial_rotary_factor");
    for section in scaling.iter().chain([config]) {
        if partial(section)?.is_some_and(|factor| factor != 1.0) {
            return Err(section.error("partial_rotary_factor", "rotating a part of a head is not supported"));
        }
    }
    let own_theta = match &scaling {
        Some(scaling) => scaling.number("rope_theta")?,
        None => None,
    };
    let theta = match own_theta {
        Some(theta) => theta,
        None => config.number("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    let base = Base { theta, head_dim };
    let Some(scaling) = scaling else { return Ok(base.unscaled()) };
    let kind = match scaling.optional("rope_type", Value::as_str, "a string")? {
        Some(kind) => Some(kind),
        None => scaling.optional("type", Value::as_str, "a string")?,
    };
    match kind.unwrap_or("default") {
        "default" => Ok(base.unscaled()),
        "linear" => Ok(base.linear(factor(&scaling)?)),
        "llama3" => llama3(&base, &scaling),
        "yarn" => yarn(&base, &scaling, max_positions),
        other => {
            let reason = format!("'{other}' is not supported; default, linear, llama3 and yarn are");
            Err(scaling.error("rope_type", &reason))
        }
    }
}

fn factor(scaling: &Config) -> Result<f64, ModelError> {
    positive(scaling, "factor")?.ok_or_else(|| scaling.error("factor", "is missing"))
}

fn positive(section: &Config, name: &str) -> Result<Option<f64>, ModelError> {
    match section.number(name)? {
        Some(value) if value > 0.0 => Ok(Some(value)),
        None => Ok(None),
        Some(value) => Err(section.error(name, &format!("expected a positive number, got {value}"))),
    }
}

struct Base {
    theta: f64,
    head_dim: usize,
}

impl Base {
    /// Radians per position of each pair.
    fn frequencies(&self) -> impl Iterator<Item = f64> {
        let (theta, head_dim) = (self.theta, self.head_dim);
        (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / head_dim as f64))
    }

    fn unscaled(&self) -> Rope {
        rope(self.frequencies(), 1.0)
    }

    fn linear(&self, factor: f64) -> Rope {
        rope(self.frequencies().map(|frequency| frequency / factor), 1.0)
    }

    /// The pair (a fraction of one) that turns `rotations` times over `positions`.
    fn pair_with_rotations(&self, rotations: f64, positions: f64) -> f64 {
        self.head_dim as f64 * (positions / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
    }
}

fn rope(frequencies: impl Iterator<Item = f64>, scale: f64) -> Rope {
    Rope { inv_freq: frequencies.map(|frequency| frequency as f32).collect(), scale: scale as f32 }
}

/// Slow pairs are stretched by the factor, fast ones stay, those between go over smoothly.
fn llama3(base: &Base, scaling: &Config) -> Result<Rope, ModelError> {
    let factor = factor(scaling)?;
    let required = |name| positive(scaling, name)?.ok_or_else(|| scaling.error(name, "is missing"));
    let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
    let original = required("original_max_position_embeddings")?;
    if high <= low {
        return Err(scaling.error("high_freq_factor", &format!("{high} is not greater than low_freq_factor {low}")));
    }
    let scaled = base.frequencies().map(|frequency| {
        let wavelength = TAU / frequency;
        if wavelength < original / high {
            return frequency;
        }
        if wavelength > original / low {
            return frequency / factor;
        }
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    });
    Ok(rope(scaled, 1.0))
}

/// Pairs that turn often over the original context stay, those that turn seldom are stretched, with a ramp between; sine and cosine
/// are scaled to keep the entropy of attention.
fn yarn(base: &Base, scaling: &Config, max_positions: usize) -> Result<Rope, ModelError> {
    let original = positive(scaling, "original_max_position_embeddings")?;
    let factor = factor(scaling)?;
    let positions = original.unwrap_or(max_positions as f64);
    let fast = positive(scaling, "beta_fast")?.unwrap_or(32.0);
    let slow = positive(scaling, "beta_slow")?.unwrap_or(1.0);
    let truncate = scaling.flag("truncate", true)?;
    let mut low = base.pair_with_rotations(fast, positions);
    let mut high = base.pair_with_rotations(slow, positions);
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(base.head_dim as f64 - 1.0));
    // Never a ramp of no width.
    let width = if high == low { 0.001 } else { high - low };
    let scaled = base.frequencies().enumerate().map(|(pair, frequency)| {
        let ramp = ((pair as f64 - low) / width).clamp(0.0, 1.0);
        frequency / factor * ramp + frequency * (1.0 - ramp)
    });
    Ok(rope(scaled, attention_factor(scaling, factor)?))
}

fn attention_factor(scaling: &Config, factor: f64) -> Result<f64, ModelError> {
    if let Some(given) = positive(scaling, "attention_factor")? {
        return Ok(given);
    }
    let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    Ok(match (scaling.number("mscale")?, scaling.number("mscale_all_dim")?) {
        (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
        _ => scale(1.0),
    })
}
