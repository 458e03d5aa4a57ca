//! Keys and values in FP8 for their way between ranks: rows of bytes in a matrix whose elements mean nothing by themselves.
//!
//! Invariant: a row's codes and its scales travel together; kernels are launched on checked shapes only.
#![allow(unsafe_code)]

use super::driver::parameters;
use super::matrix::{CudaMatrix, require};
use super::{Cuda, KvMut, KvRef};
use crate::{BackendError, HeadShape};

/// As in kernels/passing_fp8.cu.
const THREADS: usize = 256;

/// Columns of a matrix of quantised rows, as bf16.
fn columns(shape: HeadShape) -> usize {
    shape.quantized_row_bytes() / 2
}

fn check_head(op: &'static str, shape: HeadShape) -> Result<(), BackendError> {
    let holds = shape.head_dim.is_multiple_of(16) && shape.head_dim <= 128;
    require(op, holds, "head_dim a multiple of 16, at most 128", shape.head_dim)
}

impl Cuda {
    pub(super) fn run_quantized_kv(&self, shape: HeadShape, rows: usize) -> Result<CudaMatrix, BackendError> {
        check_head("quantized_kv", shape)?;
        CudaMatrix::new(&self.arena, "quantized_kv", rows, columns(shape))
    }

    pub(super) fn run_quantize_kv(
        &self,
        shape: HeadShape,
        kv: KvRef<'_, CudaMatrix>,
        row: usize,
        rows: usize,
        (out, out_row): (&CudaMatrix, usize),
    ) -> Result<(), BackendError> {
        let op = "quantize_kv";
        check_head(op, shape)?;
        kv.k.need(op, "keys", row + rows, shape.kv_width())?;
        kv.v.need(op, "values", row + rows, shape.kv_width())?;
        out.need(op, "out", out_row + rows, columns(shape))?;
        let grid = ((rows * shape.kv_heads * 32).div_ceil(THREADS), 2, 1);
        let (keys, values, to) = (kv.k.row(row), kv.v.row(row), out.row(out_row));
        let [count, heads, dim, bytes] =
            [rows, shape.kv_heads, shape.head_dim, shape.quantized_row_bytes()].map(|n| n as i32);
        let parameters = parameters![keys, values, to, count, heads, dim, bytes];
        // SAFETY: (1) parameters as in passing_fp8.cu; (2) matrices are borrowed.
        unsafe { self.stream.launch(&self.functions.quantize_kv, grid, THREADS, parameters) }
    }

    pub(super) fn run_restore_kv(
        &self,
        shape: HeadShape,
        from: &CudaMatrix,
        row: usize,
        rows: usize,
        kv: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        let op = "restore_kv";
        check_head(op, shape)?;
        from.need(op, "from", row + rows, columns(shape))?;
        kv.k.need(op, "keys", kv.first_row + rows, shape.kv_width())?;
        kv.v.need(op, "values", kv.first_row + rows, shape.kv_width())?;
        let grid = ((rows * shape.kv_width() / 8).div_ceil(THREADS), 2, 1);
        let (from, keys, values) = (from.row(row), kv.k.row(kv.first_row), kv.v.row(kv.first_row));
        let [count, heads, dim, bytes] =
            [rows, shape.kv_heads, shape.head_dim, shape.quantized_row_bytes()].map(|n| n as i32);
        let parameters = parameters![from, keys, values, count, heads, dim, bytes];
        // SAFETY: (1) parameters as in passing_fp8.cu; (2) matrices are borrowed.
        unsafe { self.stream.launch(&self.functions.restore_kv, grid, THREADS, parameters) }
    }
}
