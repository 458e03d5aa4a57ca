//! Linear layers: `x wᵀ` over tiles of rows and output features.
//!
//! Invariant: the tiles depend on the shapes alone, so that results do not depend on the number of threads.

use super::check;
use super::matrix::Matrix;
use super::threads::Threads;
use super::vector::few_rows_transposed;
use super::view::{Tile, View, ViewMut, multiply_transposed};
use super::weight::Weight;
use crate::BackendError;

/// Up to this many rows packing the weights would cost more than it brings.
const FEW_ROWS: usize = 128;
/// Rows of a tile: enough of them to make packing the weights cheap.
pub(super) const TILE_ROWS: usize = 256;
/// Output features of a tile.
const TILE_COLS: usize = 1024;
/// Weights worth waking a thread for, where one row makes reading them all the work.
const FEW_ROWS_GRAIN: usize = 1 << 16;

/// See [`crate::Backend::linear`].
pub(super) fn linear(
    threads: &Threads,
    rows: usize,
    x: &Matrix,
    w: &Weight,
    bias: Option<&Weight>,
    accumulate: bool,
    out: &mut Matrix,
) -> Result<(), BackendError> {
    let (op, w) = ("linear", w.matrix());
    check_rows(op, "x", rows, w.cols(), x)?;
    check_rows(op, "out", rows, w.rows(), out)?;
    let bias = bias.map(|bias| bias.vector(op, w.rows())).transpose()?;
    let x = View::of(x, 0..rows, 0..w.cols());
    let w = View::of(w, 0..w.rows(), 0..w.cols());
    product(threads, x, w, bias, accumulate, ViewMut::of(out, rows));
    Ok(())
}

/// A matrix has at least `rows` rows, and `cols` columns.
pub(super) fn check_rows(
    op: &'static str,
    name: &str,
    rows: usize,
    cols: usize,
    matrix: &Matrix,
) -> Result<(), BackendError> {
    check(op, matrix.rows() >= rows && matrix.cols() == cols, || {
        (format!("{name} of at least {rows} rows, {cols} columns"), format!("[{}, {}]", matrix.rows(), matrix.cols()))
    })
}

/// `out = x wᵀ (+ bias)`, or `out += …`, by all threads.
pub(super) fn product(
    threads: &Threads,
    x: View<'_>,
    w: View<'_>,
    bias: Option<&[f32]>,
    accumulate: bool,
    out: ViewMut<'_>,
) {
    threads.each(tiles(x, w, out), |tile| product_tile(x, w, bias, accumulate, tile));
}

/// `out = x wᵀ` for two matrices at once, so that threads are woken once.
pub(super) fn two_products(threads: &Threads, x: View<'_>, of: [(View<'_>, ViewMut<'_>); 2]) {
    let tiles_of = |(w, out)| tiles(x, w, out).into_iter().map(move |tile| (w, tile));
    threads.each(of.into_iter().flat_map(tiles_of).collect(), |(w, tile)| product_tile(x, w, None, false, tile));
}

/// What a thread takes of a product at a time.
fn tiles<'a>(x: View<'_>, w: View<'_>, out: ViewMut<'a>) -> Vec<Tile<'a>> {
    let tile_cols = match x.rows {
        0..=FEW_ROWS => (FEW_ROWS_GRAIN / x.rows.clamp(1, 4)).div_ceil(w.cols.max(1)).next_multiple_of(4),
        _ => TILE_COLS,
    };
    out.tiles(TILE_ROWS, tile_cols)
}

/// As [`product`] by the calling thread, with the same tiles and hence the same result.
pub(super) fn product_alone(x: View<'_>, w: View<'_>, accumulate: bool, out: ViewMut<'_>) {
    for tile in out.tiles(TILE_ROWS, TILE_COLS) {
        product_tile(x, w, None, accumulate, tile);
    }
}

fn product_tile(x: View<'_>, w: View<'_>, bias: Option<&[f32]>, accumulate: bool, tile: Tile<'_>) {
    let Tile { row, col, mut out } = tile;
    let (few, x) = (x.rows <= FEW_ROWS, x.part(row, out.rows));
    let w = w.part(col, out.cols);
    if let Some(bias) = bias {
        add_bias(&bias[col..col + out.cols], accumulate, out.reborrow());
    }
    let accumulate = accumulate || bias.is_some();
    if few {
        few_rows_transposed(x, w, out, accumulate);
    } else {
        multiply_transposed(x, w, out, accumulate);
    }
}

fn add_bias(bias: &[f32], accumulate: bool, mut out: ViewMut<'_>) {
    for row in 0..out.rows {
        let out = out.row_mut(row);
        if accumulate {
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        } else {
            out.copy_from_slice(bias);
        }
    }
}
