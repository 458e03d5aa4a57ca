//! Embedding, RMSNorm and the language-model head.
//!
//! Invariant: the mean of squares is taken in f32 over the whole row before anything is written.

use super::check;
use super::linear::{check_rows, product};
use super::matrix::Matrix;
use super::threads::Threads;
use super::vector::{dot, scale_by};
use super::view::{View, ViewMut};
use super::weight::Weight;
use crate::BackendError;

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
    x: &Matrix,
    row: usize,
    norm: &Weight,
    epsilon: f32,
    head: &Weight,
) -> Result<Vec<f32>, BackendError> {
    let (cols, head) = (x.cols(), head.matrix());
    check_rows("logits", "x", row + 1, head.cols(), x)?;
    let norm = norm.vector("logits", cols)?;
    let mut normed = vec![0.0; cols];
    norm_row(x.row(row), norm, epsilon, &mut normed);
    let mut logits = vec![0.0; head.rows()];
    let out = ViewMut::new(&mut logits, 1, head.rows(), head.rows());
    product(threads, View::new(&normed, 1, cols, cols), View::of(head, 0..head.rows(), 0..cols), None, false, out);
    Ok(logits)
}
