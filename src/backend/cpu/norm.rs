//! Embedding, RMSNorm and the language-model head.
//!
//! Invariant: the mean of squares is taken in f32 over the whole row before anything is written.

use std::ops::Range;

use super::check;
use super::linear::{check_rows, product};
use super::matrix::{Matrix, Scores};
use super::threads::Threads;
use super::vector::{dot, scale_by};
use super::view::{View, ViewMut};
use super::weight::Weight;
use crate::{BackendError, Head};

/// Rows worth waking a thread for.
const GRAIN: usize = 128;

/// See [`crate::Backend::embed`].
pub(super) fn embed(table: &Weight, ids: &[u32], x: &mut Matrix) -> Result<(), BackendError> {
    let table = table.matrix();
    check_rows("embed", "x", ids.len(), table.cols(), x)?;
    for (row, &id) in ids.iter().enumerate() {
        let known = (id as usize) < table.rows();
        check("embed", known, || (format!("token ids below {}", table.rows()), format!("{id}")))?;
        x.row_mut(row).copy_from_slice(table.row(id as usize));
    }
    Ok(())
}

/// See [`crate::Backend::rms_norm`].
pub(super) fn rms_norm(
    threads: &Threads,
    rows: usize,
    x: &Matrix,
    w: &Weight,
    epsilon: f32,
    out: &mut Matrix,
) -> Result<(), BackendError> {
    let cols = x.cols();
    let w = w.vector("rms_norm", cols)?;
    check_rows("rms_norm", "x", rows, cols, x)?;
    check_rows("rms_norm", "out", rows, cols, out)?;
    let tiles = ViewMut::of(out, rows).tiles(GRAIN, cols.max(1));
    threads.each(tiles, |mut tile| {
        for row in 0..tile.out.rows {
            norm_row(x.row(tile.row + row), w, epsilon, tile.out.row_mut(row));
        }
    });
    Ok(())
}

fn norm_row(x: &[f32], w: &[f32], epsilon: f32, out: &mut [f32]) {
    let mean_square = dot(x, x) / x.len() as f32;
    scale_by(x, 1.0 / (mean_square + epsilon).sqrt(), w, out);
}

/// See [`crate::Backend::logits`].
pub(super) fn logits(
    threads: &Threads,
    rows: usize,
    x: &Matrix,
    head: &Head<'_, Weight>,
    part: Range<usize>,
    (out, first_row): (&mut Scores, usize),
) -> Result<(), BackendError> {
    let (op, cols, weights) = ("logits", x.cols(), head.weights.matrix());
    check_rows(op, "x", rows, weights.cols(), x)?;
    check_rows(op, "out", first_row + rows, part.len(), out)?;
    let is_there = part.end <= weights.rows();
    check(op, is_there, || (format!("a part of {} tokens", weights.rows()), format!("{part:?}")))?;
    let norm = head.norm.vector(op, cols)?;
    let mut normed = Matrix::zeros(rows, cols);
    for row in 0..rows {
        norm_row(x.row(row), norm, head.epsilon, normed.row_mut(row));
    }
    let width = part.len();
    let out = ViewMut::new(&mut out.data_mut()[first_row * width..], rows, width, width);
    product(threads, View::of(&normed, 0..rows, 0..cols), View::of(weights, part, 0..cols), None, false, out);
    Ok(())
}
