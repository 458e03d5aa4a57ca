//! What an inference costs in time and memory, predicted: the work of each rank counted from the plan, divided by measured rates. Pure.
//!
//! The way of a prediction: [`work`] counts the FLOPs and bytes of one layer as the layer loop does them, [`Calibration`] says how
//! fast a device does each kind, [`network`] how long a collective takes, and [`prefill`] lays the layers of all ranks on one
//! timeline, where ranks wait for each other. What an installation really needs relative to that is [learned](Learned).
//!
//! Invariant: no I/O and no clock; a prediction follows from shape, plan, ranks and calibration alone.

mod calibration;
mod decode;
mod fit;
mod learned;
mod network;
mod prefill;
mod shape;
#[cfg(test)]
mod tests;
mod work;

pub use calibration::{Calibration, CalibrationError, Link, Network, Rates};
pub use fit::{DecodeFigure, Figures, PrefillFigure};
pub use learned::{Learned, MEMORY, Observation, Place, Rate, Work};
pub use prefill::{PrefillCost, RankCost, Stages};
pub use shape::ModelShape;
pub use work::{Exchange, LayerWork, RankWork};

use crate::plan::PrefillPlan;

/// Predicts what inferences with one model on one kind of device cost.
#[derive(Debug, Clone, PartialEq)]
pub struct CostModel {
    /// The model.
    pub shape: ModelShape,
    /// How fast the device and its network are.
    pub calibration: Calibration,
}

/// One document from its first layer to its last token, on ranks that do nothing else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DocumentCost {
    /// Seconds of context and query through all layers, until the first token can be chosen.
    pub prefill_s: f64,
    /// Seconds of each further token.
    pub token_s: f64,
    /// Tokens to generate.
    pub new_tokens: usize,
    /// Seconds of the longest step between two signs of progress: a layer of the prefill, the query's pass, or a token.
    pub longest_step_s: f64,
}

impl DocumentCost {
    /// Seconds in all.
    pub fn seconds(&self) -> f64 {
        self.prefill_s + self.token_s * self.new_tokens.saturating_sub(1) as f64
    }

    /// What it comes to where prefill and generation were seen to take other times than predicted.
    pub fn corrected(&self, learned: &Learned) -> Self {
        let (prefill, generate) = (learned.factor(Work::Prefill), learned.factor(Work::Generate));
        Self {
            prefill_s: self.prefill_s * prefill,
            token_s: self.token_s * generate,
            new_tokens: self.new_tokens,
            longest_step_s: self.longest_step_s * prefill.max(generate),
        }
    }
}

impl CostModel {
    /// A model on devices with the given rates.
    pub fn new(shape: ModelShape, calibration: Calibration) -> Self {
        Self { shape, calibration }
    }

    /// Cost of a whole document alone on `ranks` ranks.
    pub fn document(&self, plan: &PrefillPlan, ranks: usize, new_tokens: usize) -> DocumentCost {
        let prefill = self.prefill(plan, ranks);
        let query_s = self.query_pass_s(plan, ranks);
        let token_s = self.decode_step_s(&[self.kept_tokens(plan) + new_tokens / 2], ranks);
        let layer = prefill.seconds / self.shape.layers.max(1) as f64;
        let longest_step_s = layer.max(query_s).max(token_s);
        DocumentCost { prefill_s: prefill.seconds + query_s, token_s, new_tokens, longest_step_s }
    }

    /// Tokens whose keys and values a generated token reads, the query's among them.
    pub fn kept_tokens(&self, plan: &PrefillPlan) -> usize {
        decode::kept_tokens(plan) + plan.query
    }

    /// Bytes each of `ranks` ranks needs at most for the plan, the weights not included.
    pub fn memory_of_rank(&self, plan: &PrefillPlan, rank: usize, ranks: usize, new_tokens: usize) -> u64 {
        plan.memory_of_rank(rank, ranks, new_tokens, &self.shape.footprint())
    }

    /// Bytes a rank keeps of a document until its last token, and those it needs beside them until the document is prefilled; each on the rank that
    /// needs most.
    pub fn memory_parts(&self, plan: &PrefillPlan, ranks: usize, new_tokens: usize) -> [u64; 2] {
        let footprint = self.shape.footprint();
        let kept = (0..ranks).map(|rank| plan.cache_memory(rank, ranks, new_tokens, &footprint));
        let transient = (0..ranks).map(|rank| plan.prefill_memory(rank, ranks, &footprint));
        [kept.max().unwrap_or(0), transient.max().unwrap_or(0)]
    }

    /// Bytes that a rank holds for passes of `at_once` generating sequences, whatever it works on.
    pub fn fixed_memory(&self, ranks: usize, at_once: usize) -> u64 {
        self.shape.footprint().fixed_memory(ranks, at_once)
    }

    /// Bytes that a rank has beside the weights.
    pub fn memory_budget(&self) -> u64 {
        self.calibration.memory_bytes.saturating_sub(self.shape.weight_bytes())
    }
}
