//! The time of passes of few rows: the query's, and those of generated tokens, of one sequence or of a batch.
//!
//! Invariant: a pass reads every weight once, whatever its rows; every rank has all weights and a share of the keys and values.

use crate::plan::{PrefillPlan, QUERY_CHUNK};

use super::CostModel;
use super::work::product;

impl CostModel {
    /// Seconds of one step that gives every sequence of a batch its next token; `contexts` are the tokens each has so far.
    pub fn decode_step_s(&self, contexts: &[usize], ranks: usize) -> f64 {
        self.batch_step_s(contexts.len(), contexts.iter().map(|tokens| *tokens as f64).sum(), ranks)
    }

    /// As [`decode_step_s`](Self::decode_step_s), of `sequences` sequences with so many tokens together.
    pub fn batch_step_s(&self, sequences: usize, tokens: f64, ranks: usize) -> f64 {
        self.pass_s(sequences, tokens, tokens, ranks)
    }

    /// Seconds of the query's pass over the prefilled context, in chunks; it ends with the first token.
    pub fn query_pass_s(&self, plan: &PrefillPlan, ranks: usize) -> f64 {
        let chunk = |first: usize| {
            let rows = QUERY_CHUNK.min(plan.query - first);
            let keys = (plan.context + first) as f64;
            self.pass_s(rows, keys, keys * rows as f64 + rows as f64 * (rows as f64 + 1.0) / 2.0, ranks)
        };
        (0..plan.query).step_by(QUERY_CHUNK).map(chunk).sum()
    }

    /// `rows` rows through all layers, over keys of `kept` tokens that are read once; `pairs` of a row and a key are visible.
    fn pass_s(&self, rows: usize, kept: f64, pairs: f64, ranks: usize) -> f64 {
        let (shape, rates) = (&self.shape, &self.calibration.rates);
        let ranks_s = ranks.max(1) as f64;
        let matrix = |tflops, elements| self.product_s(product(rows, elements), tflops, elements);
        let products = matrix(rates.qkv_tflops, shape.hidden * shape.qkv_width())
            + matrix(rates.o_tflops, shape.hidden * shape.q_width())
            + matrix(rates.ffn_tflops, 3 * shape.hidden * shape.intermediate);
        let is_fp8 = shape.kept_row_bytes < 2 * shape.kv_width() * shape.element_bytes;
        let kept_gb_s = if is_fp8 { rates.decode_fp8_gb_s } else { rates.decode_gb_s };
        let reading = kept * shape.kept_row_bytes as f64 / ranks_s / (kept_gb_s * 1e9);
        let attending = 4.0 * shape.q_width() as f64 * pairs / ranks_s / (rates.segments_tflops * 1e12);
        let layer = products + reading.max(attending) + rates.layer_us * 1e-6 + self.partials_s(rows, ranks);
        shape.layers as f64 * layer + matrix(rates.qkv_tflops, shape.vocab * shape.hidden)
    }

    /// Seconds in which the partial results of all ranks, and their log-sum-exps, come to every rank.
    fn partials_s(&self, rows: usize, ranks: usize) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        let (shape, network) = (&self.shape, &self.calibration.network);
        let parts = (ranks * rows * shape.q_width() * shape.element_bytes) as f64;
        let log_sums = (ranks * rows * shape.heads * size_of::<f32>()) as f64;
        network.all_gather_s(ranks, parts) + network.all_gather_s(ranks, log_sums)
    }
}
