//! Final norm, language-model head or a part of it, and the choice of tokens.
//!
//! Invariant: the head is read once for all rows; logits come to the host only for rows that want them.
#![allow(unsafe_code)]

use std::ops::Range;

use super::Cuda;
use super::driver::parameters;
use super::matrix::{CudaMatrix, CudaScores, CudaWeight, need, require};
use super::products::Product;
use crate::{BackendError, Head, Next, Wanted};

/// As in kernels/choose.h.
const MAX_CHOICES: usize = 64;
const THREADS: usize = 1024;
/// Instead of the index of a logit that is not finite.
const NONE: u32 = u32::MAX;

/// `Choices` of choose.h.
#[repr(C)]
struct Choices {
    sharpness: [f32; MAX_CHOICES],
    top_p: [f32; MAX_CHOICES],
    draw: [f32; MAX_CHOICES],
}

impl Cuda {
    pub(super) fn run_logits(
        &self,
        rows: usize,
        x: &CudaMatrix,
        head: &Head<'_, CudaWeight>,
        part: Range<usize>,
        (out, first_row): (&mut CudaScores, usize),
    ) -> Result<(), BackendError> {
        let (op, weights, cols) = ("logits", head.weights, head.weights.cols);
        x.need(op, "x", rows, cols)?;
        head.norm.need(op, "norm", 1, cols)?;
        need(op, "out", (first_row + rows, part.len()), (out.rows, out.cols))?;
        require(op, cols.is_multiple_of(8), "columns a multiple of 8", cols)?;
        let is_there = part.end <= weights.rows;
        require(op, is_there, &format!("a part of {} tokens", weights.rows), format!("{part:?}"))?;
        let normed = self.arena.take(op, rows * cols * 2)?;
        self.run_rms_norm(rows, x.row(0), head.norm, head.epsilon, normed.address())?;
        let of_part = weights.piece.address() + (part.start * cols * 2) as u64;
        let product = Product::new((rows, cols, part.len()), normed.address(), of_part, out.row(first_row));
        self.wide_product(&product)
    }

    /// A token for each row of logits by temperature, nucleus and draw; none where a logit is not finite.
    fn run_choose_tokens(
        &self,
        logits: &CudaScores,
        choices: &[(f32, f32, f32)],
    ) -> Result<Vec<Option<u32>>, BackendError> {
        let op = "choose_tokens";
        let mut found = vec![[0u32; 2]; choices.len()];
        let chosen = self.arena.take(op, size_of_val(&*found))?;
        for (chunk, part) in choices.chunks(MAX_CHOICES).enumerate() {
            let (table, count) = (Choices::new(part), logits.cols as i32);
            let first = chunk * MAX_CHOICES;
            let (from, to) = (logits.row(first), chosen.address() + 8 * first as u64);
            let parameters = parameters![from, count, table, to];
            // SAFETY: (1) parameters as in choose.cu; (2) pieces stay allocated in stream order.
            unsafe { self.stream.launch(&self.functions.choose_tokens, (part.len(), 1, 1), THREADS, parameters) }?;
        }
        // SAFETY: (1) the piece has room for all of them.
        unsafe { self.stream.download(op, chosen.address(), bytemuck::cast_slice_mut(&mut found)) }?;
        Ok(found.into_iter().map(|[token, first_bad]| (first_bad == NONE).then_some(token)).collect())
    }

    pub(super) fn run_next_tokens(&self, logits: &CudaScores, wanted: &[Wanted]) -> Result<Vec<Next>, BackendError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        need("next_tokens", "logits", (wanted.len(), logits.cols), (logits.rows, logits.cols))?;
        // A row that wants its logits gets a choice that nobody looks at.
        let choice = |wanted: &Wanted| match wanted {
            Wanted::Logits => (0.0, 1.0, 0.0),
            Wanted::Token(choice) => *choice,
        };
        let chosen = match wanted.iter().any(|wanted| matches!(wanted, Wanted::Token(_))) {
            true => self.run_choose_tokens(logits, &wanted.iter().map(choice).collect::<Vec<_>>())?,
            false => vec![None; wanted.len()],
        };
        let next = |(row, (wanted, chosen)): (usize, (&Wanted, Option<u32>))| match (wanted, chosen) {
            (Wanted::Token(_), Some(token)) => Ok(Next::Token(token)),
            _ => self.read_score_row(logits, row).map(Next::Logits),
        };
        wanted.iter().zip(chosen).enumerate().map(next).collect()
    }
}

impl Choices {
    fn new(choices: &[(f32, f32, f32)]) -> Self {
        let none = [0.0; MAX_CHOICES];
        let mut table = Self { sharpness: none, top_p: none, draw: none };
        for (i, &(temperature, top_p, draw)) in choices.iter().enumerate() {
            table.sharpness[i] = if temperature > 0.0 { std::f32::consts::LOG2_E / temperature } else { 0.0 };
            (table.top_p[i], table.draw[i]) = (top_p, draw);
        }
        table
    }
}
