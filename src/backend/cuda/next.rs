//! Final norm, language-model head, and the choice of tokens.
//!
//! Invariant: the head is read once for all rows; logits come to the host only for rows that want them.
#![allow(unsafe_code)]

use super::Cuda;
use super::driver::parameters;
use super::matrix::{CudaMatrix, CudaScores, CudaWeight};
use crate::{BackendError, Next, Wanted};

/// As in kernels/choose.h.
const MAX_CHOICES: usize = 64;
/// Rows whose logits an operation has in memory at most, for what is taken into account before it runs.
pub(super) const USUAL_ROWS: usize = 64;
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

/// How logits come about.
pub(super) struct Head<'a> {
    pub norm: &'a CudaWeight,
    pub epsilon: f32,
    pub head: &'a CudaWeight,
}

impl Cuda {
    /// Logits of `rows` rows of `x` from `first` on.
    pub(super) fn device_logits(
        &self,
        x: &CudaMatrix,
        (first, rows): (usize, usize),
        by: &Head<'_>,
    ) -> Result<CudaScores, BackendError> {
        let (op, head) = ("logits", by.head);
        x.need(op, "x", first + rows, head.cols)?;
        by.norm.need(op, "norm", 1, head.cols)?;
        let normed = self.arena.take(op, rows * head.cols * 2)?;
        self.run_rms_norm(rows, x.row(first), by.norm, by.epsilon, normed.address())?;
        let logits = CudaScores::new(&self.arena, op, rows, head.rows)?;
        self.wide_product(rows, normed.address(), head, logits.row(0))?;
        Ok(logits)
    }

    /// A token for each row of logits by temperature, nucleus and draw; none where a logit is not finite.
    pub(super) fn run_choose_tokens(
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

    pub(super) fn run_next_tokens(
        &self,
        x: &CudaMatrix,
        by: &Head<'_>,
        wanted: &[Wanted],
    ) -> Result<Vec<Next>, BackendError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.device_logits(x, (0, wanted.len()), by)?;
        // A row that wants its logits gets a choice that nobody looks at.
        let choice = |wanted: &Wanted| match wanted {
            Wanted::Logits => (0.0, 1.0, 0.0),
            Wanted::Token(choice) => *choice,
        };
        let chosen = match wanted.iter().any(|wanted| matches!(wanted, Wanted::Token(_))) {
            true => self.run_choose_tokens(&logits, &wanted.iter().map(choice).collect::<Vec<_>>())?,
            false => vec![None; wanted.len()],
        };
        let next = |(row, (wanted, chosen)): (usize, (&Wanted, Option<u32>))| match (wanted, chosen) {
            (Wanted::Token(_), Some(token)) => Ok(Next::Token(token)),
            _ => self.read_score_row(&logits, row).map(Next::Logits),
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
