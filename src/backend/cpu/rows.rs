//! Operations on one row after the other: embedding, RMSNorm, RoPE.
//!
//! Invariant: a row's result depends on that row alone.

use std::ops::Range;

use rayon::prelude::*;

use super::matrix::Matrix;
use super::vector;
use crate::backend::{BackendError, HeadShape, KvMut};

/// Rows of a piece of work.
const ROWS_A_PIECE: usize = 128;

/// `x[i] = table[ids[i]]`.
pub(super) fn embed(table: &Matrix, ids: &[u32], x: &mut Matrix) -> Result<(), BackendError> {
    for (&id, row) in ids.iter().zip(x.data_mut().chunks_exact_mut(table.cols())) {
        if id as usize >= table.rows() {
            let expected = format!("a token below {}", table.rows());
            return Err(BackendError::Shape { op: "embed", expected, got: id.to_string() });
        }
        row.copy_from_slice(table.row(id as usize));
    }
    Ok(())
}

/// `out = x / rms(x) * w` of one row.
pub(super) fn norm_row(x: &[f32], w: &[f32], epsilon: f32, out: &mut [f32]) {
    let mean_of_squares = vector::dot(x, x) / x.len() as f32;
    let factor = 1.0 / (mean_of_squares + epsilon).sqrt();
    out.iter_mut().zip(x.iter().zip(w)).for_each(|(out, (&x, &w))| *out = x * factor * w);
}

/// `out = x / rms(x) * w` for the first `rows` rows.
pub(super) fn rms_norm(rows: usize, x: &Matrix, w: &Matrix, epsilon: f32, out: &mut Matrix) {
    let width = x.cols();
    let piece = ROWS_A_PIECE * width;
    out.rows_in_mut(0..rows).par_chunks_mut(piece).zip(x.rows_in(0..rows).par_chunks(piece)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            norm_row(x, w.data(), epsilon, out);
        }
    });
}

/// Angles of RoPE.
pub(super) struct Angles<'a> {
    /// Position of each row.
    pub positions: &'a [u32],
    /// Radians per position of each pair.
    pub inv_freq: &'a [f32],
    /// Factor on sine and cosine.
    pub scale: f32,
}

/// Rotates q and k of `rows` of `qkv` in place and copies the rotated keys and the values to `kv`.
pub(super) fn rope_store(
    shape: HeadShape,
    rows: Range<usize>,
    angles: &Angles<'_>,
    qkv: &mut Matrix,
    kv: KvMut<'_, Matrix>,
) {
    let (width, kv_width, q_width) = (shape.qkv_width(), shape.kv_width(), shape.q_width());
    let stored = kv.first_row..kv.first_row + rows.len();
    let keys = kv.k.rows_in_mut(stored.clone()).par_chunks_mut(ROWS_A_PIECE * kv_width);
    let values = kv.v.rows_in_mut(stored).par_chunks_mut(ROWS_A_PIECE * kv_width);
    let positions = angles.positions.par_chunks(ROWS_A_PIECE);
    let packed = qkv.rows_in_mut(rows).par_chunks_mut(ROWS_A_PIECE * width);
    packed.zip(positions).zip(keys.zip(values)).for_each(|((packed, positions), (keys, values))| {
        let stored = keys.chunks_exact_mut(kv_width).zip(values.chunks_exact_mut(kv_width));
        for ((row, &position), (key, value)) in packed.chunks_exact_mut(width).zip(positions).zip(stored) {
            rotate(&mut row[..q_width + kv_width], shape.head_dim, position, angles);
            key.copy_from_slice(&row[q_width..][..kv_width]);
            value.copy_from_slice(&row[q_width + kv_width..]);
        }
    });
}

/// Rotates all heads of a row by the angles of one position, which is formed in f32 as the published models were trained with.
fn rotate(heads: &mut [f32], head_dim: usize, position: u32, angles: &Angles<'_>) {
    let half = head_dim / 2;
    for (i, &frequency) in angles.inv_freq.iter().enumerate() {
        let (sin, cos) = (position as f32 * frequency).sin_cos();
        let (sin, cos) = (sin * angles.scale, cos * angles.scale);
        for head in heads.chunks_exact_mut(head_dim) {
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}
