//! Embedding, norms, copies: what is done to each row by itself.
//!
//! Invariant: kernels are launched on checked shapes only.
#![allow(unsafe_code)]

use super::Cuda;
use super::driver::parameters;
use super::kept::Rows;
use super::matrix::{CudaMatrix, CudaWeight, require};
use crate::BackendError;

/// As in kernels/rms_norm.cu.
const MAX_NORM_COLS: usize = 8 * 1024 * 4;

impl Cuda {
    pub(super) fn run_embed(&self, table: &CudaWeight, ids: &[u32], x: &mut CudaMatrix) -> Result<(), BackendError> {
        let op = "embed";
        x.need(op, "x", ids.len(), table.cols)?;
        require(op, table.cols.is_multiple_of(8), "columns a multiple of 8", table.cols)?;
        let largest = ids.iter().copied().max().unwrap_or(0) as usize;
        require(op, largest < table.rows, &format!("ids below {}", table.rows), largest)?;
        let device_ids = self.arena.take(op, ids.len() * 4)?;
        // SAFETY: (1) the piece has room for the ids.
        unsafe { self.stream.upload(op, bytemuck::cast_slice(ids), device_ids.address()) }?;
        let (from, at, cols, to) = (table.piece.address(), device_ids.address(), table.cols as i32, x.row(0));
        let threads = (table.cols / 8).next_multiple_of(32).min(512);
        // SAFETY: (1) parameters as in embed.cu; (2) the ids' piece stays allocated in stream order, the rest is borrowed.
        unsafe {
            self.stream.launch(&self.functions.embed, (ids.len(), 1, 1), threads, parameters![from, at, cols, to])
        }
    }

    /// `x` and `out` are addresses of `rows` rows of `w.cols` elements.
    pub(super) fn run_rms_norm(
        &self,
        rows: usize,
        x: u64,
        w: &CudaWeight,
        epsilon: f32,
        out: u64,
    ) -> Result<(), BackendError> {
        let op = "rms_norm";
        w.need(op, "w", 1, w.cols)?;
        require(
            op,
            w.cols.is_multiple_of(8) && w.cols <= MAX_NORM_COLS,
            &format!("columns a multiple of 8, at most {MAX_NORM_COLS}"),
            w.cols,
        )?;
        let (weight, cols) = (w.piece.address(), w.cols as i32);
        let threads = (w.cols / 8).next_multiple_of(32).min(1024);
        // SAFETY: (1) parameters as in rms_norm.cu; (2) matrices are borrowed.
        unsafe {
            self.stream.launch(
                &self.functions.rms_norm,
                (rows, 1, 1),
                threads,
                parameters![x, weight, epsilon, cols, out],
            )
        }
    }

    pub(super) fn run_copy_rows(
        &self,
        src: &CudaMatrix,
        src_row: usize,
        rows: usize,
        dst: &mut CudaMatrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        let op = "copy_rows";
        src.need(op, "src", src_row + rows, src.cols)?;
        dst.need_either(op, "dst", dst_row + rows, src.cols)?;
        if rows == 0 {
            return Ok(());
        }
        if let Some(scales) = &dst.fp8 {
            let from = Rows { count: rows, stride: src.cols };
            return self.keep(src.cols / scales.heads, &from, &[src.row(src_row)], &[&*dst], dst_row);
        }
        // SAFETY: (1) checked above; `dst` is uniquely borrowed, so it is not `src`.
        unsafe { self.stream.copy(op, src.row(src_row), dst.row(dst_row), rows * src.cols * 2) }
    }
}
