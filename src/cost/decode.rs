//! The time of passes of few rows: the query's, and those of generated tokens, of one sequence or of a batch.
//!
//! Invariant: a pass reads every weight once, whatever its rows; every rank has a share of the keys and values, and reads its share of the weights of the MLP and
//! of the language-model head, and all others.

use crate::plan::{Host, PrefillPlan, QUERY_CHUNK};

use super::CostModel;
use super::work::product;

/// Tokens of the context whose keys and values are kept.
pub(super) fn kept_tokens(plan: &PrefillPlan) -> usize {
    plan.hosts.iter().map(Host::kept_rows).sum()
}

impl CostModel {
    /// Seconds of one step that gives every sequence of a batch its next token; `contexts` are the tokens each has so far.
    pub fn decode_step_s(&self, contexts: &[usize], ranks: usize) -> f64 {
        self.batch_step_s(contexts.len(), contexts.iter().map(|tokens| *tokens as f64).sum(), ranks)
    }

    /// As [`decode_step_s`](Self::decode_step_s), of `sequences` sequences with so many tokens together.
    pub fn batch_step_s(&self, sequences: usize, tokens: f64, ranks: usize) -> f64 {
        self.pass_s(sequences, tokens, tokens, ranks)
    }

    /// Seconds from the end of the prefill to the first token: of the query's pass over the prefilled context, in chunks, or of the choice alone where it
    /// has gone through the layers with its context.
    pub fn query_pass_s(&self, plan: &PrefillPlan, ranks: usize) -> f64 {
        if plan.query_rows() > 0 {
            return self.choice_s(1, ranks);
        }
        let chunk = |first: usize| {
            let rows = QUERY_CHUNK.min(plan.query - first);
            let keys = (kept_tokens(plan) + first) as f64;
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
            + matrix(rates.ffn_tflops, 3 * shape.hidden * shape.intermediate.div_ceil(ranks.max(1)));
        let reading = kept * shape.kept_row_bytes as f64 / ranks_s / (self.kept_gb_s() * 1e9);
        let attending = 4.0 * shape.q_width() as f64 * pairs / ranks_s / (rates.segments_tflops * 1e12);
        let layer = products
            + reading.max(attending)
            + rates.layer_us * 1e-6
            + self.partials_s(rows, ranks)
            + self.sums_s(rows, ranks);
        shape.layers as f64 * layer + self.choice_s(rows, ranks)
    }

    /// Seconds of the language-model head, and until every rank has the logits of all.
    fn choice_s(&self, rows: usize, ranks: usize) -> f64 {
        let tokens = self.shape.vocab.div_ceil(ranks.max(1));
        let (elements, logits) = (tokens * self.shape.hidden, ranks * rows * tokens);
        self.product_s(product(rows, elements), self.calibration.rates.qkv_tflops, elements)
            + self.calibration.network.partials_s(ranks, (logits * size_of::<f32>()) as f64)
    }

    /// GB/s at which kept keys and values are read, in the bytes they have.
    pub(super) fn kept_gb_s(&self) -> f64 {
        let (shape, rates) = (&self.shape, &self.calibration.rates);
        let is_fp8 = shape.kept_row_bytes < 2 * shape.kv_width() * shape.element_bytes;
        if is_fp8 { rates.decode_fp8_gb_s } else { rates.decode_gb_s }
    }

    /// Seconds in which the partial results of attention of all ranks, and their log-sum-exps, come to every rank.
    pub(super) fn partials_s(&self, rows: usize, ranks: usize) -> f64 {
        let shape = &self.shape;
        let row = shape.q_width() * shape.element_bytes + shape.heads * size_of::<f32>();
        self.calibration.network.partials_s(ranks, (ranks * rows * row) as f64)
    }

    /// Seconds in which what all ranks' parts of the MLP give comes to every rank.
    fn sums_s(&self, rows: usize, ranks: usize) -> f64 {
        let row = self.shape.hidden * size_of::<f32>();
        self.calibration.network.partials_s(ranks, (ranks * rows * row) as f64)
    }
}
