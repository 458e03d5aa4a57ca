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
        refined.refine_layer(&figures.decode);
        refined
    }

    /// What a layer takes beyond its bytes: the mean over all figures, each with the same weight.
    fn refine_layer(&mut self, figures: &[DecodeFigure]) {
        self.rates.layer_us = match figures.len() {
            0 => return,
            count => {
                let without = Self { rates: Rates { layer_us: 0.0, ..self.rates }, ..self.clone() };
                let beyond_us = |figure: &DecodeFigure| {
                    let model = CostModel::new(figure.shape, without.clone());
                    1e6 * (figure.seconds - model.decode_step_s(&figure.contexts, 1)) / figure.shape.layers as f64
                };
                (figures.iter().map(beyond_us).sum::<f64>() / count as f64).max(0.0)
            }
        };
    }
}
