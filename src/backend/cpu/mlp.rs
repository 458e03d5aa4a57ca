//! The gated MLP, in chunks of rows.
//!
//! Invariant: the memory it needs grows with the number of threads, not with the number of rows.

use super::check;
use super::linear::{TILE_ROWS, check_rows, product, product_alone};
use super::matrix::Matrix;
use super::threads::Threads;
use super::vector::silu_times;
use super::view::{View, ViewMut};
use super::weight::Weight;
use crate::BackendError;

/// See [`crate::Backend::mlp`].
pub(super) fn mlp(
    threads: &Threads,
    rows: usize,
    h: &Matrix,
    gate_up: &Weight,
    down: &Weight,
    x: &mut Matrix,
) -> Result<(), BackendError> {
    let (gate_up, down) = (gate_up.matrix(), down.matrix());
    let width = down.cols();
    check("mlp", gate_up.rows() == 2 * width, || {
        (format!("gate and up of {} rows together", 2 * width), format!("{}", gate_up.rows()))
    })?;
    check_rows("mlp", "h", rows, gate_up.cols(), h)?;
    check_rows("mlp", "x", rows, down.rows(), x)?;
    let h = View::of(h, 0..rows, 0..gate_up.cols());
    let weights = Weights {
        gate_up: View::of(gate_up, 0..gate_up.rows(), 0..gate_up.cols()),
        down: View::of(down, 0..down.rows(), 0..width),
        width,
    };
    let x = ViewMut::of(x, rows);
    let chunks = x.tiles(TILE_ROWS, down.rows().max(1));
    if chunks.len() < threads.count() {
        for chunk in chunks {
            weights.chunk_together(threads, h.part(chunk.row, chunk.out.rows), chunk.out);
        }
    } else {
        let scratch = || (vec![0.0; TILE_ROWS * 2 * width], vec![0.0; TILE_ROWS * width]);
        threads.each_with(chunks, scratch, |(both, gated), chunk| {
            weights.chunk_alone(h.part(chunk.row, chunk.out.rows), both, gated, chunk.out);
        });
    }
    Ok(())
}

struct Weights<'a> {
    gate_up: View<'a>,
    down: View<'a>,
    width: usize,
}

impl Weights<'_> {
    /// One chunk by one thread: for long inputs, where every thread has chunks of its own.
    fn chunk_alone(&self, h: View<'_>, both: &mut [f32], gated: &mut [f32], x: ViewMut<'_>) {
        let (rows, width) = (h.rows, self.width);
        product_alone(h, self.gate_up, false, ViewMut::new(both, rows, 2 * width, 2 * width));
        for row in 0..rows {
            self.gate(&both[row * 2 * width..(row + 1) * 2 * width], &mut gated[row * width..(row + 1) * width]);
        }
        product_alone(View::new(gated, rows, width, width), self.down, true, x);
    }

    /// One chunk by all threads.
    fn chunk_together(&self, threads: &Threads, h: View<'_>, x: ViewMut<'_>) {
        let (rows, width) = (h.rows, self.width);
        let (mut both, mut gated) = (vec![0.0; rows * 2 * width], vec![0.0; rows * width]);
        product(threads, h, self.gate_up, None, false, ViewMut::new(&mut both, rows, 2 * width, 2 * width));
        for row in 0..rows {
            self.gate(&both[row * 2 * width..(row + 1) * 2 * width], &mut gated[row * width..(row + 1) * width]);
        }
        product(threads, View::new(&gated, rows, width, width), self.down, None, true, x);
    }

    /// `silu(gate) * up` of one row.
    fn gate(&self, both: &[f32], gated: &mut [f32]) {
        let (gate, up) = both.split_at(self.width);
        silu_times(gate, up, gated);
    }
}
