//! Linear layers, the MLP, and the scores of retaining heads: products with weights, split among threads.
//!
//! Many rows are split by rows; the few rows of a query or a decode step by the weight's rows, so that every thread reads a part
//! of the weight.
//!
//! Invariant: how the work is split follows from the shapes, not from the number of threads, so results do not depend on it.

use rayon::prelude::*;

use super::gemm::{View, Write, multiply};
use super::matrix::Matrix;
use super::vector;

/// Rows of a piece of work when there are many.
const ROWS_A_PIECE: usize = 64;
/// Fewer rows than this are split by the weight's rows.
const FEW_ROWS: usize = 16;
/// Weight elements of a piece of work when there are few rows.
const WEIGHTS_A_PIECE: usize = 1 << 17;

/// `out = x wᵀ + bias`, or `out += …`, for the first `rows` rows. Shapes have been checked.
pub(super) fn linear(rows: usize, x: &Matrix, w: &Matrix, bias: Option<&Matrix>, accumulate: bool, out: &mut Matrix) {
    let width = out.cols();
    let write = if accumulate { Write::Add } else { Write::Set };
    let input = x.rows_in(0..rows);
    product(input, x.cols(), w, out.rows_in_mut(0..rows), width, write);
    if let Some(bias) = bias {
        for row in out.rows_in_mut(0..rows).chunks_exact_mut(width) {
            row.iter_mut().zip(bias.data()).for_each(|(value, &bias)| *value += bias);
        }
    }
}

/// `out = x wᵀ` or `out += x wᵀ` over whole rows.
fn product(x: &[f32], x_width: usize, w: &Matrix, out: &mut [f32], width: usize, write: Write) {
    let rows = out.len() / width;
    let whole = View::rows(w.data(), w.rows(), w.cols(), w.cols()).transposed();
    if rows >= FEW_ROWS {
        out.par_chunks_mut(ROWS_A_PIECE * width).zip(x.par_chunks(ROWS_A_PIECE * x_width)).for_each(|(out, x)| {
            multiply(View::rows(x, out.len() / width, x_width, x_width), whole, out, width, write);
        });
        return;
    }
    let columns = (WEIGHTS_A_PIECE / w.cols().max(1)).max(16);
    for (x, out) in x.chunks_exact(x_width).zip(out.chunks_exact_mut(width)) {
        let piece = |first: usize, out: &mut [f32]| {
            let part = &w.data()[first * w.cols()..(first + out.len()) * w.cols()];
            let part = View::rows(part, out.len(), w.cols(), w.cols()).transposed();
            let width = out.len();
            multiply(View::rows(x, 1, x_width, x_width), part, out, width, write);
        };
        if width <= columns {
            piece(0, out);
        } else {
            out.par_chunks_mut(columns).enumerate().for_each(|(i, out)| piece(i * columns, out));
        }
    }
}

/// `x += w_down · (silu(gate) * up)` with `[gate; up] = w_gate_up · h`, for the first `rows` rows.
pub(super) fn mlp(rows: usize, h: &Matrix, gate_up: &Matrix, down: &Matrix, x: &mut Matrix) {
    let (h_width, x_width, width) = (h.cols(), x.cols(), down.cols());
    if rows < FEW_ROWS {
        let mut both = vec![0.0; rows * 2 * width];
        product(h.rows_in(0..rows), h_width, gate_up, &mut both, 2 * width, Write::Set);
        let gated = gate(&mut both, width);
        product(&gated, width, down, x.rows_in_mut(0..rows), x_width, Write::Add);
        return;
    }
    let (gate_up, down) = (weight_view(gate_up), weight_view(down));
    let inputs = h.rows_in(0..rows).par_chunks(ROWS_A_PIECE * h_width);
    x.rows_in_mut(0..rows).par_chunks_mut(ROWS_A_PIECE * x_width).zip(inputs).for_each_init(
        Vec::new,
        |both, (x, h)| {
            let rows = x.len() / x_width;
            both.resize(rows * 2 * width, 0.0);
            multiply(View::rows(h, rows, h_width, h_width), gate_up, both, 2 * width, Write::Set);
            for row in both.chunks_exact_mut(2 * width) {
                let (gate, up) = row.split_at_mut(width);
                vector::silu_times(gate, up);
            }
            multiply(View::rows(both, rows, width, 2 * width), down, x, x_width, Write::Add);
        },
    );
}

fn weight_view(w: &Matrix) -> View<'_> {
    View::rows(w.data(), w.rows(), w.cols(), w.cols()).transposed()
}

/// `silu(gate) * up` of each row of `[gate | up]`, close together.
fn gate(both: &mut [f32], width: usize) -> Vec<f32> {
    let mut gated = Vec::with_capacity(both.len() / 2);
    for row in both.chunks_exact_mut(2 * width) {
        let (gate, up) = row.split_at_mut(width);
        vector::silu_times(gate, up);
        gated.extend_from_slice(gate);
    }
    gated
}

/// `out[h, i] = w2[h] · silu(w1 · qkv[i])` for the first `rows` rows.
pub(super) fn retaining_scores(rows: usize, qkv: &Matrix, w1: &Matrix, w2: &Matrix, out: &mut Matrix) {
    let (width, hidden, heads) = (qkv.cols(), w1.rows(), w2.rows());
    let pieces: Vec<Vec<f32>> = qkv
        .rows_in(0..rows)
        .par_chunks(ROWS_A_PIECE * width)
        .map(|qkv| {
            let rows = qkv.len() / width;
            let (mut inner, mut scores) = (vec![0.0; rows * hidden], vec![0.0; rows * heads]);
            multiply(View::rows(qkv, rows, width, width), weight_view(w1), &mut inner, hidden, Write::Set);
            vector::silu_in_place(&mut inner);
            multiply(View::rows(&inner, rows, hidden, hidden), weight_view(w2), &mut scores, heads, Write::Set);
            scores
        })
        .collect();
    let columns = out.cols();
    for (i, scores) in pieces.iter().flat_map(|piece| piece.chunks_exact(heads)).enumerate() {
        for (head, &score) in scores.iter().enumerate() {
            out.data_mut()[head * columns + i] = score;
        }
    }
}

/// `head · (x / rms(x) * norm)`: one logit a row of `head`.
pub(super) fn logits(x: &[f32], norm: &Matrix, epsilon: f32, head: &Matrix) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    super::rows::norm_row(x, norm.data(), epsilon, &mut normed);
    let mut out = vec![0.0; head.rows()];
    let width = out.len();
    product(&normed, x.len(), head, &mut out, width, Write::Set);
    out
}
