//! A calibration from what a benchmark measured: every rate becomes what makes its stage take as long as it took.
//!
//! Invariant: a rate that nothing was measured of stays as it was.

use super::calibration::{Calibration, Rates};
use super::prefill::Stages;
use super::{CostModel, ModelShape};
use crate::plan::PrefillPlan;

/// A measured prefill on one device.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillFigure {
    /// The model.
    pub shape: ModelShape,
    /// How the context was cut.
    pub plan: PrefillPlan,
    /// Seconds it took.
    pub seconds: f64,
    /// Seconds of the stages in a run that was profiled.
    pub stages: Stages,
}

/// A measured step of a batch on one device.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeFigure {
    /// The model.
    pub shape: ModelShape,
    /// Tokens of each sequence.
    pub contexts: Vec<usize>,
    /// Seconds of a step.
    pub seconds: f64,
}

/// What a benchmark measured on one device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// Name of the device.
    pub device: Option<String>,
    /// GB/s of a copy, read and written.
    pub copy_gb_s: Option<f64>,
    /// GB/s of weights of a product with one row.
    pub weights_gb_s: Option<f64>,
    /// Prefills.
    pub prefill: Vec<PrefillFigure>,
    /// Steps of generation.
    pub decode: Vec<DecodeFigure>,
}

/// One rate: how it is read, and the stage that it decides about.
struct Fit {
    rate: fn(&mut Rates) -> &mut f64,
    stage: fn(&Stages) -> f64,
    /// Whether it is about prefills with this plan.
    concerns: fn(&PrefillPlan) -> bool,
}

const FITS: [Fit; 7] = [
    Fit { rate: |rates| &mut rates.qkv_tflops, stage: |stages| stages.qkv_s, concerns: |_| true },
    Fit { rate: |rates| &mut rates.o_tflops, stage: |stages| stages.o_s, concerns: |_| true },
    Fit { rate: |rates| &mut rates.ffn_tflops, stage: |stages| stages.ffn_s, concerns: |_| true },
    Fit { rate: |rates| &mut rates.retaining_head_tflops, stage: |stages| stages.retaining_head_s, concerns: |_| true },
    Fit {
        rate: |rates| &mut rates.causal_tflops,
        stage: |stages| stages.attention_s,
        concerns: |plan| plan.hosts.len() == 1,
    },
    Fit {
        rate: |rates| &mut rates.segments_tflops,
        stage: |stages| stages.attention_s,
        concerns: |plan| plan.hosts.len() > 1 && !plan.mode.is_exact(),
    },
    Fit { rate: |rates| &mut rates.memory_gb_s, stage: |stages| stages.other_s, concerns: |_| true },
];

impl Calibration {
    /// With the rates that `figures` show, all prefills together and all steps together.
    pub fn refined(&self, figures: &Figures) -> Self {
        let mut refined = self.clone();
        if let Some(device) = &figures.device {
            refined.device.clone_from(device);
        }
        for fit in &FITS {
            // Predictions of this calibration: a stage depends on its own rate alone.
            let (mut predicted_s, mut measured_s) = (0.0, 0.0);
            for figure in figures.prefill.iter().filter(|figure| (fit.concerns)(&figure.plan)) {
                // The profiled run is a little slower than the others.
                let slower = figure.stages.seconds() / figure.seconds;
                let stage = (fit.stage)(&figure.stages) / slower;
                if stage > 0.0 {
                    let prefill = CostModel::new(figure.shape, self.clone()).prefill(&figure.plan, 1);
                    predicted_s += prefill.ranks.first().map_or(0.0, |rank| (fit.stage)(&rank.stages));
                    measured_s += stage;
                }
            }
            if predicted_s > 0.0 && measured_s > 0.0 {
                *(fit.rate)(&mut refined.rates) *= predicted_s / measured_s;
            }
        }
        if let Some(copy_gb_s) = figures.copy_gb_s {
            refined.rates.decode_gb_s = copy_gb_s;
        }
        refined.rates.weights_gb_s = figures.weights_gb_s.or(refined.rates.weights_gb_s);
        refined.refine_decode(&figures.decode);
        refined
    }

    /// Bandwidth and what a layer takes beyond its bytes, as they fit the figures best; the bandwidth alone where those do not tell the two apart.
    fn refine_decode(&mut self, figures: &[DecodeFigure]) {
        let without = Self { rates: Rates { layer_us: 0.0, ..self.rates }, ..self.clone() };
        let terms = |figure: &DecodeFigure| {
            let model = CostModel::new(figure.shape, without.clone());
            let all_s = model.decode_step_s(&figure.contexts, 1);
            let of_weights = |_| model.decode_step_s(&vec![0; figure.contexts.len()], 1);
            let known_s = self.rates.weights_gb_s.map_or(0.0, of_weights);
            Step { bytes_s: all_s - known_s, layers: figure.shape.layers as f64, seconds: figure.seconds - known_s }
        };
        let steps: Vec<Step> = figures.iter().map(terms).collect();
        let layer_s = 1e-6 * self.rates.layer_us;
        let (slower, layer_s) = fitted(&steps).unwrap_or_else(|| (slower(&steps, layer_s), layer_s));
        if slower.is_finite() && slower > 0.0 {
            self.rates.decode_gb_s /= slower;
            self.rates.layer_us = 1e6 * layer_s;
        }
    }
}

/// A measured step of decode, and what is predicted of it; without what is known.
struct Step {
    /// Seconds of its bytes.
    bytes_s: f64,
    layers: f64,
    /// Seconds it took.
    seconds: f64,
}

/// By how much bytes are slower than predicted if a layer takes `layer_s` beside them.
fn slower(steps: &[Step], layer_s: f64) -> f64 {
    let (bytes_s, left_s) = steps.iter().fold((0.0, 0.0), |(bytes_s, left_s), step| {
        (bytes_s + step.bytes_s, left_s + step.seconds - step.layers * layer_s)
    });
    left_s / bytes_s
}

/// The same, and seconds of a layer, by least squares; `None` where steps differ too little, or a layer would take less than nothing.
fn fitted(steps: &[Step]) -> Option<(f64, f64)> {
    let sum = |of: fn(&Step) -> f64| steps.iter().map(of).sum::<f64>();
    let (bytes, layers) = (sum(|step| step.bytes_s * step.bytes_s), sum(|step| step.layers * step.layers));
    let both = sum(|step| step.bytes_s * step.layers);
    let determinant = bytes * layers - both * both;
    let (by_bytes, by_layers) = (sum(|step| step.bytes_s * step.seconds), sum(|step| step.layers * step.seconds));
    let slower = (by_bytes * layers - by_layers * both) / determinant;
    let layer_s = (by_layers * bytes - by_bytes * both) / determinant;
    (determinant > 1e-3 * bytes * layers && layer_s >= 0.0).then_some((slower, layer_s))
}
