//! Keys and values that are kept in FP8: writing them, and bringing them back where a kernel reads bf16 alone.
//!
//! Invariant: a row is written as a whole, its codes and its scales, in one launch.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::Cuda;
use super::arena::Arena;
use super::driver::{Function, Stream, parameters};
use super::matrix::{CudaMatrix, Fp8Scales, require};
use crate::{BackendError, HeadShape};

/// Threads of a block of keep_fp8 (as in kernels/kv_fp8.cu) and of restore_fp8.
const THREADS: usize = 256;

/// `Kept` of kv_fp8.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Kept {
    from: u64,
    codes: u64,
    scales: u64,
}

/// Rows of bf16, `stride` elements apart.
pub(super) struct Rows {
    pub count: usize,
    pub stride: usize,
}

impl Cuda {
    /// Writes rows into matrices in FP8 from row `first_row` on; `from` are the addresses of their first rows. One matrix or two (keys and values).
    pub(super) fn keep(
        &self,
        head_dim: usize,
        rows: &Rows,
        from: &[u64],
        to: &[&CudaMatrix],
        first_row: usize,
    ) -> Result<(), BackendError> {
        let op = "keep_fp8";
        let kept = |i: usize| -> Result<(Kept, &Fp8Scales), BackendError> {
            let scales = to[i].fp8.as_ref().ok_or(BackendError::Shape {
                op,
                expected: "keys and values both in FP8".to_owned(),
                got: "bf16".to_owned(),
            })?;
            let kept = Kept { from: from[i], codes: to[i].piece.address(), scales: scales.piece.address() };
            Ok((kept, scales))
        };
        let (keys, scales) = kept(0)?;
        let values = if to.len() > 1 { kept(1)?.0 } else { keys };
        require(
            op,
            head_dim.is_multiple_of(16) && head_dim <= 128,
            "head_dim a multiple of 16, at most 128",
            head_dim,
        )?;
        let pairs = rows.count * scales.heads;
        let [count, stride, heads, dim, first, capacity] =
            [rows.count, rows.stride, scales.heads, head_dim, first_row, to[0].rows].map(|n| n as i32);
        let grid = ((pairs * 32).div_ceil(THREADS), to.len(), 1);
        let parameters = parameters![keys, values, count, stride, heads, dim, first, capacity];
        // SAFETY: (1) parameters as in kv_fp8.cu; (2) matrices are borrowed.
        unsafe { self.stream.launch(&self.functions.keep_fp8, grid, THREADS, parameters) }
    }
}

/// The first `rows` rows of a matrix in FP8, in bf16.
pub(super) fn restored(
    (stream, restore): (&Stream, &Function),
    arena: &Arc<Arena>,
    shape: HeadShape,
    matrix: &CudaMatrix,
    rows: usize,
) -> Result<CudaMatrix, BackendError> {
    let op = "restore_fp8";
    let plain = CudaMatrix::new(arena, op, rows.max(1), matrix.cols)?;
    let Some(scales) = &matrix.fp8 else {
        return Err(BackendError::Shape { op, expected: "a matrix in FP8".to_owned(), got: "bf16".to_owned() });
    };
    let (from, scales, to) = (matrix.piece.address(), scales.piece.address(), plain.row(0));
    let [count, heads, dim, capacity] = [rows, shape.kv_heads, shape.head_dim, matrix.rows].map(|n| n as i32);
    let grid = ((rows * matrix.cols / 16).div_ceil(THREADS), 1, 1);
    // SAFETY: (1) parameters as in kv_fp8.cu; (2) pieces stay allocated in stream order, the matrix is borrowed.
    unsafe { stream.launch(restore, grid, THREADS, parameters![from, scales, count, heads, dim, capacity, to]) }?;
    Ok(plain)
}
