//! Scores of tokens, the best of them, and their keys and values.
//!
//! Invariant: kernels are launched on checked shapes only; chosen rows never leave the device.
#![allow(unsafe_code)]

use std::ops::Range;

use super::blas::{Form, Operands};
use super::driver::parameters;
use super::matrix::{CudaMatrix, CudaRows, CudaScores, CudaWeight, need, require};
use super::{Cuda, KvMut, KvRef};
use crate::{BackendError, HeadShape};

/// Rows whose hidden activations of a retaining head are in memory at a time.
pub(super) const SCORE_ROWS: usize = 4096;
/// Threads of a block of one warp a row.
const WARPS_THREADS: usize = 256;

/// `Pooling` of top_k.h.
#[repr(C)]
struct Pooling {
    before_first: i32,
    before_count: i32,
    candidate_first: i32,
    candidate_count: i32,
    pool: i32,
}

impl Cuda {
    pub(super) fn run_retaining_scores(
        &self,
        rows: usize,
        qkv: &CudaMatrix,
        w1: &CudaWeight,
        w2: &CudaWeight,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        let op = "retaining_scores";
        qkv.need(op, "qkv", rows, w1.cols)?;
        w2.need(op, "w2", w2.rows, w1.rows)?;
        require(
            op,
            out.rows == w2.rows && out.cols >= rows,
            &format!("out [{}, at least {rows}]", w2.rows),
            format!("[{}, {}]", out.rows, out.cols),
        )?;
        let hidden = self.arena.take(op, rows.min(SCORE_ROWS) * w1.rows * 4)?;
        for first in (0..rows).step_by(SCORE_ROWS) {
            let rows = (rows - first).min(SCORE_ROWS);
            let form = Form { wide: true, ..Form::new(rows, w1.rows, w1.cols) };
            let operands = Operands { x: qkv.row(first), w: w1.piece.address(), bias: 0, out: hidden.address() };
            // SAFETY: (1) checked above; the piece stays allocated in stream order.
            unsafe { self.blas.multiply(&self.stream, form, operands) }?;
            let (from, weights, to) = (hidden.address(), w2.piece.address(), out.row(0));
            let [count, width, heads, first, stride] = [rows, w1.rows, w2.rows, first, out.cols].map(|n| n as i32);
            let grid = ((rows * 32).div_ceil(WARPS_THREADS), 1, 1);
            let parameters = parameters![from, weights, count, width, heads, first, stride, to];
            // SAFETY: (1) parameters as in retaining.cu; (2) as above.
            unsafe { self.stream.launch(&self.functions.retaining_scores, grid, WARPS_THREADS, parameters) }?;
        }
        Ok(())
    }

    pub(super) fn run_query_aware_scores(
        &self,
        shape: HeadShape,
        queries: Range<usize>,
        q_qkv: &CudaMatrix,
        rows: usize,
        k: &CudaMatrix,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        let op = "query_aware_scores";
        require(op, !queries.is_empty(), "at least one query", queries.len())?;
        let wide_enough = q_qkv.rows >= queries.end && q_qkv.cols >= shape.q_width();
        let q_wanted = format!("queries [at least {}, at least {}]", queries.end, shape.q_width());
        require(op, wide_enough, &q_wanted, format!("[{}, {}]", q_qkv.rows, q_qkv.cols))?;
        k.need(op, "keys", rows, shape.kv_width())?;
        require(
            op,
            out.rows == shape.kv_heads && out.cols >= rows,
            &format!("out [{}, at least {rows}]", shape.kv_heads),
            format!("[{}, {}]", out.rows, out.cols),
        )?;
        let mean = self.arena.take(op, shape.kv_width() * 4)?;
        let [count, stride, group, kv_heads, head_dim, rows_count, out_stride] =
            [queries.len(), q_qkv.cols, shape.group(), shape.kv_heads, shape.head_dim, rows, out.cols]
                .map(|n| n as i32);
        let (q, mean, keys, to) = (q_qkv.row(queries.start), mean.address(), k.row(0), out.row(0));
        let threads = shape.head_dim.next_multiple_of(32).min(256);
        // SAFETY: (1) parameters as in query_aware.cu; (2) the piece stays allocated in stream order, matrices are borrowed.
        unsafe {
            self.stream.launch(
                &self.functions.query_mean,
                (shape.kv_heads, 1, 1),
                threads,
                parameters![q, count, stride, group, head_dim, mean],
            )
        }?;
        let grid = ((rows * 32).div_ceil(WARPS_THREADS), shape.kv_heads, 1);
        let parameters = parameters![mean, keys, rows_count, kv_heads, head_dim, out_stride, to];
        // SAFETY: (1), (2) as above.
        unsafe { self.stream.launch(&self.functions.query_scores, grid, WARPS_THREADS, parameters) }
    }

    pub(super) fn run_set_scores(&self, values: &[f32], out: &mut CudaScores) -> Result<(), BackendError> {
        let op = "set_scores";
        require(op, values.len() == out.rows * out.cols, &format!("{} values", out.rows * out.cols), values.len())?;
        // SAFETY: (1) checked above.
        unsafe { self.stream.upload(op, bytemuck::cast_slice(values), out.row(0)) }
    }

    pub(super) fn run_top_k(
        &self,
        scores: &CudaScores,
        before: Range<usize>,
        candidates: Range<usize>,
        excluded: usize,
        k: usize,
        pool: bool,
    ) -> Result<CudaRows, BackendError> {
        let op = "top_k";
        let inside = before.end.max(candidates.end) <= scores.cols;
        require(op, inside, &format!("columns below {}", scores.cols), format!("{before:?} and {candidates:?}"))?;
        let eligible = candidates.len().saturating_sub(excluded);
        require(op, k <= eligible, &format!("at most {eligible} to choose"), k)?;
        let chosen = CudaRows {
            piece: self.arena.take(op, scores.rows * k * 4)?,
            heads: scores.rows,
            k,
            bounds: candidates.start + excluded..candidates.end,
        };
        if k == 0 {
            return Ok(chosen);
        }
        let keys = self.arena.take(op, scores.rows * candidates.len() * 4)?;
        let [before_first, before_count, candidate_first, candidate_count, excluded, k, stride] =
            [before.start, before.len(), candidates.start, candidates.len(), excluded, k, scores.cols]
                .map(|n| n as i32);
        let pooling = Pooling { before_first, before_count, candidate_first, candidate_count, pool: i32::from(pool) };
        let (from, keys, to) = (scores.row(0), keys.address(), chosen.piece.address());
        let parameters = parameters![from, stride, pooling, excluded, k, keys, to];
        // SAFETY: (1) parameters as in top_k.cu; (2) pieces stay allocated in stream order.
        unsafe { self.stream.launch(&self.functions.top_k, (scores.rows, 1, 1), 1024, parameters) }?;
        Ok(chosen)
    }

    pub(super) fn run_gather_kv(
        &self,
        shape: HeadShape,
        chosen: &CudaRows,
        source_offset: usize,
        src: KvRef<'_, CudaMatrix>,
        dst: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        let op = "gather_kv";
        require(op, chosen.heads == shape.kv_heads, &format!("rows for {} heads", shape.kv_heads), chosen.heads)?;
        require(op, shape.head_dim.is_multiple_of(8), "head_dim a multiple of 8", shape.head_dim)?;
        if chosen.k == 0 {
            return Ok(());
        }
        require(
            op,
            chosen.bounds.start >= source_offset,
            &format!("rows from {source_offset} on"),
            chosen.bounds.start,
        )?;
        for (what, matrix, rows) in [
            ("keys", src.k, chosen.bounds.end - source_offset),
            ("values", src.v, chosen.bounds.end - source_offset),
            ("gathered keys", dst.k, dst.first_row + chosen.k),
            ("gathered values", dst.v, dst.first_row + chosen.k),
        ] {
            need(op, what, (rows, shape.kv_width()), (matrix.rows, matrix.cols))?;
        }
        let [k, offset, kv_heads, head_dim] =
            [chosen.k, source_offset, shape.kv_heads, shape.head_dim].map(|n| n as i32);
        let (rows, from_k, from_v) = (chosen.piece.address(), src.k.row(0), src.v.row(0));
        let (to_k, to_v) = (dst.k.row(dst.first_row), dst.v.row(dst.first_row));
        let threads = (shape.kv_width() / 8).next_multiple_of(32).min(256);
        let parameters = parameters![rows, k, offset, kv_heads, head_dim, from_k, from_v, to_k, to_v];
        // SAFETY: (1) parameters as in gather_kv.cu; (2) matrices are borrowed; chosen rows lie within their bounds, checked above.
        unsafe { self.stream.launch(&self.functions.gather_kv, (chosen.k, 2, 1), threads, parameters) }
    }
}
