//! Partial results become one: of attention by their log-sum-exps, sums added up, columns put side by side.
//!
//! Invariant: kernels are launched on checked shapes only.
#![allow(unsafe_code)]

use std::ops::Range;

use super::Cuda;
use super::driver::parameters;
use super::matrix::{CudaMatrix, CudaScores, need, require};
use crate::{BackendError, HeadShape, even_part};

const THREADS: usize = 256;

impl Cuda {
    pub(super) fn run_merge(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        out: &mut CudaMatrix,
        lse: &mut CudaScores,
        (part, part_lse, first): (&CudaMatrix, &CudaScores, usize),
    ) -> Result<(), BackendError> {
        let op = "merge";
        check_heads(op, shape)?;
        out.need(op, "out", rows.end, shape.q_width())?;
        need(op, "lse", (rows.end, shape.heads), (lse.rows, lse.cols))?;
        part.need(op, "part", first + rows.len(), shape.q_width())?;
        need(op, "part_lse", (first + rows.len(), shape.heads), (part_lse.rows, part_lse.cols))?;
        let (heads, head_dim) = (shape.heads as i32, shape.head_dim as i32);
        let (to, to_lse, from, from_lse) =
            (out.row(rows.start), lse.row(rows.start), part.row(first), part_lse.row(first));
        let parameters = parameters![heads, head_dim, to, to_lse, from, from_lse];
        // SAFETY: (1) parameters as in merge.cu; (2) matrices are borrowed.
        unsafe { self.stream.launch(&self.functions.merge, (rows.len(), 1, 1), THREADS, parameters) }
    }

    pub(super) fn run_merge_stacked(
        &self,
        shape: HeadShape,
        rows: usize,
        count: usize,
        parts: &CudaMatrix,
        part_lse: &CudaScores,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let op = "merge_stacked";
        check_heads(op, shape)?;
        out.need(op, "out", rows, shape.q_width())?;
        parts.need(op, "parts", rows * count, shape.q_width())?;
        need(op, "part_lse", (rows * count, shape.heads), (part_lse.rows, part_lse.cols))?;
        let [count, row_count, heads, head_dim] = [count, rows, shape.heads, shape.head_dim].map(|n| n as i32);
        let (from, from_lse, to) = (parts.row(0), part_lse.row(0), out.row(0));
        let parameters = parameters![count, row_count, heads, head_dim, from, from_lse, to];
        // SAFETY: (1) parameters as in merge_stacked.cu; (2) matrices are borrowed.
        unsafe { self.stream.launch(&self.functions.merge_stacked, (rows, 1, 1), THREADS, parameters) }
    }

    pub(super) fn run_add_partials(
        &self,
        rows: usize,
        count: usize,
        partials: &CudaScores,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let op = "add_partials";
        x.need(op, "x", rows, partials.cols)?;
        need(op, "partials", (count * rows, x.cols), (partials.rows, partials.cols))?;
        require(op, x.cols.is_multiple_of(8), "columns a multiple of 8", x.cols)?;
        let (elements, from, to) = (rows * x.cols, partials.row(0), x.row(0));
        let grid = ((elements / 8).div_ceil(THREADS), 1, 1);
        let [count, elements] = [count, elements].map(|n| n as i32);
        // SAFETY: (1) parameters as in add_partials.cu; (2) matrices are borrowed.
        unsafe {
            self.stream.launch(&self.functions.add_partials, grid, THREADS, parameters![count, elements, from, to])
        }
    }

    pub(super) fn run_join_columns(
        &self,
        rows: usize,
        count: usize,
        parts: &CudaScores,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        let (op, cols) = ("join_columns", out.cols);
        let width = even_part(cols, 0, count).len();
        need(op, "parts", (count * rows, width), (parts.rows, parts.cols))?;
        need(op, "out", (rows, cols), (out.rows, out.cols))?;
        let (from, to, grid) = (parts.row(0), out.row(0), (cols.div_ceil(THREADS), rows, 1));
        let [rows, cols, width] = [rows, cols, width].map(|n| n as i32);
        // SAFETY: (1) parameters as in join_columns.cu; (2) matrices are borrowed.
        unsafe {
            self.stream.launch(&self.functions.join_columns, grid, THREADS, parameters![rows, cols, width, from, to])
        }
    }
}

fn check_heads(op: &'static str, shape: HeadShape) -> Result<(), BackendError> {
    require(op, shape.head_dim.is_multiple_of(8), "head_dim a multiple of 8", shape.head_dim)
}
