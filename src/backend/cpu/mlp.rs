//! The gated MLP, or a part of its width, in chunks of rows.
//!
//! Invariant: the memory it needs grows with the number of threads, not with the number of rows.

use std::ops::Range;

use super::check;
use super::linear::{TILE_ROWS, check_rows, product, product_alone, two_products};
use super::matrix::{Matrix, Scores};
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
    let part = Part::of("mlp", gate_up, down, 0..down.cols())?;
    check_rows("mlp", "h", rows, gate_up.cols(), h)?;
    check_rows("mlp", "x", rows, down.rows(), x)?;
    part.apply(threads, View::of(h, 0..rows, 0..gate_up.cols()), true, ViewMut::of(x, rows));
    Ok(())
}

/// See [`crate::Backend::mlp_part`].
pub(super) fn mlp_part(
    threads: &Threads,
    rows: usize,
    h: &Matrix,
    (gate_up, down, part): (&Weight, &Weight, Range<usize>),
    (out, first_row): (&mut Scores, usize),
) -> Result<(), BackendError> {
    let part = Part::of("mlp_part", gate_up, down, part)?;
    check_rows("mlp_part", "h", rows, gate_up.cols(), h)?;
    check_rows("mlp_part", "out", first_row + rows, down.rows(), out)?;
    let (_, out) = ViewMut::of(out, first_row + rows).split_rows(first_row);
    part.apply(threads, View::of(h, 0..rows, 0..gate_up.cols()), false, out);
    Ok(())
}

/// See [`crate::Backend::add_partials`].
pub(super) fn add_partials(rows: usize, count: usize, partials: &Scores, x: &mut Matrix) -> Result<(), BackendError> {
    check_rows("add_partials", "partials", count * rows, x.cols(), partials)?;
    check_rows("add_partials", "x", rows, partials.cols(), x)?;
    let mut sum = vec![0.0; x.cols()];
    for row in 0..rows {
        sum.fill(0.0);
        for partial in 0..count {
            sum.iter_mut().zip(partials.row(partial * rows + row)).for_each(|(sum, value)| *sum += value);
        }
        x.row_mut(row).iter_mut().zip(&sum).for_each(|(x, sum)| *x += sum);
    }
    Ok(())
}

/// Weights of some columns of the MLP's width.
struct Part<'a> {
    gate: View<'a>,
    up: View<'a>,
    down: View<'a>,
}

impl<'a> Part<'a> {
    fn of(op: &'static str, gate_up: &'a Weight, down: &'a Weight, part: Range<usize>) -> Result<Self, BackendError> {
        let width = down.cols();
        check(op, gate_up.rows() == 2 * width, || {
            (format!("gate and up of {} rows together", 2 * width), format!("{}", gate_up.rows()))
        })?;
        check(op, part.start <= part.end && part.end <= width, || {
            (format!("a part of {width} columns"), format!("{part:?}"))
        })?;
        let (gate_up, down) = (gate_up.matrix(), down.matrix());
        let rows = |first: usize| View::of(gate_up, first + part.start..first + part.end, 0..gate_up.cols());
        Ok(Self { gate: rows(0), up: rows(width), down: View::of(down, 0..down.rows(), part) })
    }

    fn width(&self) -> usize {
        self.gate.rows
    }

    fn apply(&self, threads: &Threads, h: View<'_>, accumulate: bool, mut out: ViewMut<'_>) {
        if self.width() == 0 {
            if !accumulate {
                (0..out.rows).for_each(|row| out.row_mut(row).fill(0.0));
            }
            return;
        }
        let chunks = out.tiles(TILE_ROWS, self.down.rows.max(1));
        if chunks.len() < threads.count() {
            for chunk in chunks {
                self.chunk_together(threads, h.part(chunk.row, chunk.out.rows), accumulate, chunk.out);
            }
            return;
        }
        let scratch = || (vec![0.0; TILE_ROWS * 2 * self.width()], vec![0.0; TILE_ROWS * self.width()]);
        threads.each_with(chunks, scratch, |(both, gated), chunk| {
            self.chunk_alone(h.part(chunk.row, chunk.out.rows), (both, gated), accumulate, chunk.out);
        });
    }

    /// One chunk by one thread: for long inputs, where every thread has chunks of its own.
    fn chunk_alone(&self, h: View<'_>, (both, gated): (&mut [f32], &mut [f32]), accumulate: bool, out: ViewMut<'_>) {
        let (rows, width) = (h.rows, self.width());
        let (gate, up) = ViewMut::new(both, rows, 2 * width, 2 * width).split_cols(width);
        product_alone(h, self.gate, false, gate);
        product_alone(h, self.up, false, up);
        self.gate(both, gated, rows);
        product_alone(View::new(gated, rows, width, width), self.down, accumulate, out);
    }

    /// One chunk by all threads.
    fn chunk_together(&self, threads: &Threads, h: View<'_>, accumulate: bool, out: ViewMut<'_>) {
        let (rows, width) = (h.rows, self.width());
        let (mut both, mut gated) = (vec![0.0; rows * 2 * width], vec![0.0; rows * width]);
        let (gate, up) = ViewMut::new(&mut both, rows, 2 * width, 2 * width).split_cols(width);
        two_products(threads, h, [(self.gate, gate), (self.up, up)]);
        self.gate(&both, &mut gated, rows);
        product(threads, View::new(&gated, rows, width, width), self.down, None, accumulate, out);
    }

    /// `silu(gate) * up` of the first `rows` rows.
    fn gate(&self, both: &[f32], gated: &mut [f32], rows: usize) {
        let width = self.width();
        for (both, gated) in both.chunks_exact(2 * width).zip(gated.chunks_exact_mut(width)).take(rows) {
            let (gate, up) = both.split_at(width);
            silu_times(gate, up, gated);
        }
    }
}
