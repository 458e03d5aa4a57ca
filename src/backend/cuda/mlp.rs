//! The gated MLP, or a part of its width: gate, up and SwiGLU, and back.
//!
//! Invariant: kernels are launched on checked shapes only; what a row of at most [`SKINNY_ROWS`] gives depends neither on the others nor on their number.
#![allow(unsafe_code)]

use std::ops::Range;

use super::Cuda;
use super::blas::{Form, Operands};
use super::driver::parameters;
use super::matrix::{CudaMatrix, CudaScores, CudaWeight, need, require};
use super::products::{Into, Product, SKINNY_ROWS, THREADS, Taker};
use crate::{BackendError, PART_COLS};

/// Rows that an MLP is computed for at a time: enough to fill the device, few enough that gate and up stay small.
pub(super) const MLP_ROWS: usize = 4096 + 256;
/// Rows of a tile of the products.
const TILE_ROWS: usize = 128;

/// Weights of some columns of the width.
struct Part<'a> {
    gate_up: &'a CudaWeight,
    down: &'a CudaWeight,
    cols: Range<usize>,
}

/// What becomes of the last product: its address.
#[derive(Clone, Copy)]
enum Out {
    /// Added to the residual.
    Residual(u64),
    /// Left in f32.
    Sums(u64),
}

impl<'a> Part<'a> {
    fn of(
        op: &'static str,
        gate_up: &'a CudaWeight,
        down: &'a CudaWeight,
        cols: Range<usize>,
    ) -> Result<Self, BackendError> {
        let width = down.cols;
        gate_up.need(op, "gate_up", 2 * width, down.rows)?;
        let fits = |col: usize| col.is_multiple_of(PART_COLS);
        let widths_fit = fits(width) && fits(gate_up.cols);
        require(op, widths_fit, "widths that are multiples of 8", format!("{width}, {}", gate_up.cols))?;
        let is_part = cols.start <= cols.end && cols.end <= width && fits(cols.start) && fits(cols.end);
        require(op, is_part, &format!("a part of {width} columns in multiples of 8"), format!("{cols:?}"))?;
        Ok(Self { gate_up, down, cols })
    }

    fn is_whole(&self) -> bool {
        self.width() == self.down.cols
    }

    fn width(&self) -> usize {
        self.cols.len()
    }

    /// Columns of what goes in.
    fn hidden(&self) -> usize {
        self.gate_up.cols
    }

    fn gate(&self) -> u64 {
        self.gate_up.piece.address() + (self.cols.start * self.hidden() * 2) as u64
    }

    fn up(&self) -> u64 {
        self.gate() + (self.down.cols * self.hidden() * 2) as u64
    }

    fn back(&self) -> u64 {
        self.down.piece.address() + (self.cols.start * 2) as u64
    }
}

impl Cuda {
    pub(super) fn run_mlp(
        &self,
        rows: usize,
        h: &CudaMatrix,
        gate_up: &CudaWeight,
        down: &CudaWeight,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let op = "mlp";
        h.need(op, "h", rows, gate_up.cols)?;
        x.need(op, "x", rows, down.rows)?;
        let part = Part::of(op, gate_up, down, 0..down.cols)?;
        match self.products.taker(rows) {
            Taker::Library => self.mlp_of_many(rows, h, &part, Out::Residual(x.row(0))),
            Taker::Skinny => self.mlp_of_few(rows, h.row(0), &part, Out::Residual(x.row(0))),
            Taker::Vector => self.mlp_of_one(h, &part, x),
        }
    }

    pub(super) fn run_mlp_part(
        &self,
        rows: usize,
        h: &CudaMatrix,
        (gate_up, down, cols): (&CudaWeight, &CudaWeight, Range<usize>),
        (out, first_row): (&mut CudaScores, usize),
    ) -> Result<(), BackendError> {
        let op = "mlp_part";
        h.need(op, "h", rows, gate_up.cols)?;
        need(op, "out", (first_row + rows, down.rows), (out.rows, out.cols))?;
        let (part, to) = (Part::of(op, gate_up, down, cols)?, out.row(first_row));
        if part.width() == 0 {
            // SAFETY: (1) the rows are there, see above.
            return unsafe { self.stream.fill(op, to, 0, rows * down.rows * 4) };
        }
        match rows {
            ..=SKINNY_ROWS => self.mlp_of_few(rows, h.row(0), &part, Out::Sums(to)),
            _ => self.mlp_of_many(rows, h, &part, Out::Sums(to)),
        }
    }

    fn mlp_of_many(&self, rows: usize, h: &CudaMatrix, part: &Part<'_>, out: Out) -> Result<(), BackendError> {
        let (op, width, hidden) = ("mlp", part.width(), part.hidden());
        // As even as can be, in whole tiles: a short last chunk would read all weights once more for little.
        let chunk = rows.div_ceil(rows.div_ceil(MLP_ROWS)).next_multiple_of(TILE_ROWS).min(rows);
        let both = self.arena.take(op, chunk * 2 * width * 2)?;
        let product = self.arena.take(op, chunk * width * 2)?;
        // Rows of gate and of up lie together where all of them are taken.
        let (of_gate, of_up) = ((part.gate(), both.address()), (part.up(), both.address() + (width * 2) as u64));
        let (halves, half) = if part.is_whole() { (vec![of_gate], 2 * width) } else { (vec![of_gate, of_up], width) };
        for first in (0..rows).step_by(chunk) {
            let rows = (rows - first).min(chunk);
            let up = Form { out_stride: 2 * width, ..Form::new(rows, half, hidden) };
            for &(w, out) in &halves {
                // SAFETY: (1) checked by the callers; pieces stay allocated in stream order.
                unsafe { self.blas.multiply(&self.stream, up, Operands { x: h.row(first), w, bias: 0, out }) }?;
            }
            self.swiglu(rows, width, both.address(), product.address())?;
            let (wide, out) = match out {
                Out::Residual(x) => (false, x + (first * part.down.rows * 2) as u64),
                Out::Sums(sums) => (true, sums + (first * part.down.rows * 4) as u64),
            };
            let back = Form::new(rows, part.down.rows, width);
            let back = Form { w_stride: part.down.cols, wide, accumulate: !wide, ..back };
            let operands = Operands { x: product.address(), w: part.back(), bias: 0, out };
            // SAFETY: (1) as above.
            unsafe { self.blas.multiply(&self.stream, back, operands) }?;
        }
        Ok(())
    }

    /// Gate, up and their product in one kernel, and back.
    fn mlp_of_few(&self, rows: usize, h: u64, part: &Part<'_>, out: Out) -> Result<(), BackendError> {
        let width = part.width();
        let joined = self.arena.take("mlp", rows * width * 2)?;
        let up = Product::new((rows, part.hidden(), width), h, part.gate(), joined.address());
        self.skinny(Into::Swiglu, &Product { up: part.down.cols, ..up })?;
        let back = |out| {
            let back = Product::new((rows, width, part.down.rows), joined.address(), part.back(), out);
            Product { stride: part.down.cols, ..back }
        };
        match out {
            Out::Residual(x) => self.skinny(Into::Bf16, &Product { accumulate: true, ..back(x) }),
            Out::Sums(sums) => self.skinny(Into::F32, &back(sums)),
        }
    }

    /// One row by the kernels for vectors.
    fn mlp_of_one(&self, h: &CudaMatrix, part: &Part<'_>, x: &mut CudaMatrix) -> Result<(), BackendError> {
        let (cols, width) = (part.hidden(), part.width());
        let joined = self.arena.take("mlp", width * 2)?;
        let (from, weights, to, cols_word, width_word) =
            (h.row(0), part.gate(), joined.address(), cols as i32, width as i32);
        let grid = ((width * 32).div_ceil(THREADS), 1, 1);
        let parameters = parameters![from, weights, cols_word, width_word, to];
        // SAFETY: (1) parameters as in gemv.cu; (2) the piece stays allocated in stream order, the rest is borrowed.
        unsafe { self.stream.launch(&self.functions.gemv_swiglu, grid, THREADS, parameters) }?;
        let back = Product::new((1, width, part.down.rows), to, part.back(), x.row(0));
        self.gemv(&Product { accumulate: true, ..back })
    }

    fn swiglu(&self, rows: usize, width: usize, from: u64, to: u64) -> Result<(), BackendError> {
        let threads = 256;
        let (grid, columns) = (((width / 8).div_ceil(threads), rows, 1), width as i32);
        // SAFETY: (1) parameters as in swiglu.cu; (2) by the caller's pieces.
        unsafe { self.stream.launch(&self.functions.swiglu, grid, threads, parameters![from, columns, to]) }
    }
}
