//! Scores by which rows are chosen to be passed on: a trained retaining head, or the query's own attention.
//!
//! Invariant: `out` is `[kv_heads, at least rows]`; columns beyond `rows` are not written.

use std::ops::Range;

use super::linear::{TILE_ROWS, check_rows, product, product_alone};
use super::matrix::{Matrix, Scores};
use super::threads::Threads;
use super::vector::{blend, scale, silu_in_place};
use super::view::{Tile, View, ViewMut};
use super::weight::Weight;
use super::{check, check_shape};
use crate::{BackendError, HeadShape};

/// See [`crate::Backend::retaining_scores`].
pub(super) fn retaining_scores(
    threads: &Threads,
    rows: usize,
    qkv: &Matrix,
    w1: &Weight,
    w2: &Weight,
    out: &mut Scores,
) -> Result<(), BackendError> {
    let (w1, w2) = (w1.matrix(), w2.matrix());
    let width = w1.rows();
    check_rows("retaining_scores", "qkv", rows, w1.cols(), qkv)?;
    check("retaining_scores", w2.cols() == width, || (format!("w2 of {width} columns"), format!("{}", w2.cols())))?;
    check_scores("retaining_scores", w2.rows(), rows, out)?;
    let qkv = View::of(qkv, 0..rows, 0..w1.cols());
    let w1 = View::of(w1, 0..width, 0..w1.cols());
    let w2 = View::of(w2, 0..w2.rows(), 0..width);
    let scratch = || vec![0.0; TILE_ROWS.min(rows) * width];
    threads.each_with(column_tiles(out, w2.rows, rows), scratch, |hidden, Tile { col, out, .. }| {
        let count = out.cols;
        let hidden = &mut hidden[..count * width];
        product_alone(qkv.part(col, count), w1, false, ViewMut::new(hidden, count, width, width));
        silu_in_place(hidden);
        product_alone(w2, View::new(hidden, count, width, width), false, out);
    });
    Ok(())
}

/// See [`crate::Backend::query_aware_scores`].
pub(super) fn query_aware_scores(
    threads: &Threads,
    shape: HeadShape,
    queries: Range<usize>,
    q_qkv: &Matrix,
    rows: usize,
    k: &Matrix,
    out: &mut Scores,
) -> Result<(), BackendError> {
    let op = "query_aware_scores";
    check_shape(op, shape)?;
    check_rows(op, "q_qkv", queries.end, q_qkv.cols(), q_qkv)?;
    check(op, q_qkv.cols() >= shape.q_width() && !queries.is_empty(), || {
        (format!("queries of at least {} columns", shape.q_width()), format!("rows {queries:?} of {}", q_qkv.cols()))
    })?;
    check_rows(op, "k", rows, shape.kv_width(), k)?;
    check_scores(op, shape.kv_heads, rows, out)?;
    // The mean of the products is the product with the mean.
    let mean = mean_queries(shape, queries, q_qkv);
    let d = shape.head_dim;
    let out = out.row_windows(shape.kv_heads, rows);
    for (head, scores) in out.into_iter().enumerate() {
        let mean = View::new(&mean[head * d..(head + 1) * d], 1, d, d);
        product(threads, mean, View::of(k, 0..rows, head * d..(head + 1) * d), None, false, scores);
    }
    Ok(())
}

/// The mean query of each KV head's group, scaled by `1/sqrt(head_dim)`: `[kv_heads * head_dim]`.
fn mean_queries(shape: HeadShape, queries: Range<usize>, q_qkv: &Matrix) -> Vec<f32> {
    let d = shape.head_dim;
    let mut mean = vec![0.0; shape.kv_width()];
    let count = queries.len() * shape.group();
    for row in queries {
        for (head, q) in q_qkv.row(row)[..shape.q_width()].chunks(d).enumerate() {
            let kv_head = head / shape.group();
            blend(&mut mean[kv_head * d..(kv_head + 1) * d], 1.0, q, 1.0);
        }
    }
    scale(&mut mean, 1.0 / (count as f32 * (d as f32).sqrt()));
    mean
}

/// See [`crate::Backend::set_scores`].
pub(super) fn set_scores(values: &[f32], out: &mut Scores) -> Result<(), BackendError> {
    let (rows, cols) = (out.rows(), out.cols());
    check("set_scores", values.len() == rows * cols, || {
        (format!("[{rows}, {cols}] values"), format!("{}", values.len()))
    })?;
    out.data_mut().copy_from_slice(values);
    Ok(())
}

fn check_scores(op: &'static str, heads: usize, rows: usize, out: &Scores) -> Result<(), BackendError> {
    check(op, out.rows() == heads && out.cols() >= rows, || {
        (format!("out of {heads} rows, at least {rows} columns"), format!("[{}, {}]", out.rows(), out.cols()))
    })
}

/// Windows of all heads and up to [`TILE_ROWS`] columns, over the first `cols` columns.
fn column_tiles(out: &mut Scores, heads: usize, cols: usize) -> Vec<Tile<'_>> {
    ViewMut::of(out, heads).split_cols(cols).0.tiles(heads.max(1), TILE_ROWS)
}

impl Scores {
    /// The first `cols` columns of each row as a window of its own.
    fn row_windows(&mut self, rows: usize, cols: usize) -> Vec<ViewMut<'_>> {
        ViewMut::of(self, rows).split_cols(cols).0.tiles(1, cols.max(1)).into_iter().map(|tile| tile.out).collect()
    }
}
