//! Embedding, norms, products, RoPE: what a layer does to each row by itself.
//!
//! Invariant: kernels are launched on checked shapes only; a product of one row is a matrix-vector kernel, of more rows cuBLASLt.
#![allow(unsafe_code)]

use std::ops::Range;

use super::blas::{Form, Operands};
use super::driver::parameters;
use super::kept::Rows;
use super::matrix::{CudaMatrix, CudaScores, CudaWeight, require};
use super::{Cuda, KvMut};
use crate::backend::{BackendError, HeadShape};

/// Rows that an MLP is computed for at a time: enough to fill the device, few enough that gate and up stay small.
pub(super) const MLP_ROWS: usize = 4096;
/// As in kernels/rope.h.
const MAX_RUNS: usize = 64;
/// As in kernels/rope.h.
const MAX_PAIRS: usize = 128;
/// As in kernels/rms_norm.cu.
const MAX_NORM_COLS: usize = 8 * 1024 * 4;
/// Threads of a block of one warp an output.
const WARPS_THREADS: usize = 256;

/// `PositionRuns` of rope.h.
#[repr(C)]
struct PositionRuns {
    count: i32,
    row: [i32; MAX_RUNS],
    position: [u32; MAX_RUNS],
}

/// `Frequencies` of rope.h.
#[repr(C)]
struct Frequencies {
    scale: f32,
    radians: [f32; MAX_PAIRS],
}

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

    pub(super) fn run_linear(
        &self,
        rows: usize,
        x: &CudaMatrix,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        accumulate: bool,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let op = "linear";
        x.need(op, "x", rows, w.cols)?;
        out.need(op, "out", rows, w.rows)?;
        if let Some(bias) = bias {
            bias.need(op, "bias", 1, w.rows)?;
        }
        require(op, w.cols.is_multiple_of(8), "columns a multiple of 8", w.cols)?;
        let bias = bias.map_or(0, |bias| bias.piece.address());
        if rows == 1 {
            return self.gemv(x.row(0), w, bias, accumulate, out.row(0));
        }
        let form = Form { rows, width: w.rows, inner: w.cols, wide: false, bias: bias != 0, accumulate };
        // SAFETY: (1) checked above; matrices are borrowed.
        unsafe {
            self.blas.multiply(
                &self.stream,
                form,
                Operands { x: x.row(0), w: w.piece.address(), bias, out: out.row(0) },
            )
        }
    }

    fn gemv(&self, x: u64, w: &CudaWeight, bias: u64, accumulate: bool, out: u64) -> Result<(), BackendError> {
        let (weights, add, cols, width) = (w.piece.address(), i32::from(accumulate), w.cols as i32, w.rows as i32);
        let grid = ((w.rows * 32).div_ceil(WARPS_THREADS), 1, 1);
        let parameters = parameters![x, weights, bias, add, cols, width, out];
        // SAFETY: (1) parameters as in gemv.cu; (2) by the callers' borrows.
        unsafe { self.stream.launch(&self.functions.gemv, grid, WARPS_THREADS, parameters) }
    }

    pub(super) fn run_mlp(
        &self,
        rows: usize,
        h: &CudaMatrix,
        gate_up: &CudaWeight,
        down: &CudaWeight,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let (op, width) = ("mlp", down.cols);
        h.need(op, "h", rows, gate_up.cols)?;
        x.need(op, "x", rows, down.rows)?;
        gate_up.need(op, "gate_up", 2 * width, down.rows)?;
        require(
            op,
            width.is_multiple_of(8) && gate_up.cols.is_multiple_of(8),
            "widths that are multiples of 8",
            format!("{width}, {}", gate_up.cols),
        )?;
        if rows == 1 {
            return self.mlp_row(h, gate_up, down, x);
        }
        let chunk = rows.min(MLP_ROWS);
        let both = self.arena.take(op, chunk * 2 * width * 2)?;
        let product = self.arena.take(op, chunk * width * 2)?;
        for first in (0..rows).step_by(MLP_ROWS) {
            let rows = (rows - first).min(MLP_ROWS);
            let up = Form { rows, width: 2 * width, inner: gate_up.cols, wide: false, bias: false, accumulate: false };
            let operands = Operands { x: h.row(first), w: gate_up.piece.address(), bias: 0, out: both.address() };
            // SAFETY: (1) checked above; pieces stay allocated in stream order.
            unsafe { self.blas.multiply(&self.stream, up, operands) }?;
            self.swiglu(rows, width, both.address(), product.address())?;
            let back = Form { rows, width: down.rows, inner: width, wide: false, bias: false, accumulate: true };
            let operands = Operands { x: product.address(), w: down.piece.address(), bias: 0, out: x.row(first) };
            // SAFETY: (1) as above.
            unsafe { self.blas.multiply(&self.stream, back, operands) }?;
        }
        Ok(())
    }

    fn mlp_row(
        &self,
        h: &CudaMatrix,
        gate_up: &CudaWeight,
        down: &CudaWeight,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let product = self.arena.take("mlp", down.cols * 2)?;
        let (from, weights, cols, width, to) =
            (h.row(0), gate_up.piece.address(), gate_up.cols as i32, down.cols as i32, product.address());
        let grid = ((down.cols * 32).div_ceil(WARPS_THREADS), 1, 1);
        let parameters = parameters![from, weights, cols, width, to];
        // SAFETY: (1) parameters as in gemv.cu; (2) the piece stays allocated in stream order, the rest is borrowed.
        unsafe { self.stream.launch(&self.functions.gemv_swiglu, grid, WARPS_THREADS, parameters) }?;
        self.gemv(product.address(), down, 0, true, x.row(0))
    }

    fn swiglu(&self, rows: usize, width: usize, from: u64, to: u64) -> Result<(), BackendError> {
        let threads = 256;
        let (grid, columns) = (((width / 8).div_ceil(threads), rows, 1), width as i32);
        // SAFETY: (1) parameters as in swiglu.cu; (2) by the caller's pieces.
        unsafe { self.stream.launch(&self.functions.swiglu, grid, threads, parameters![from, columns, to]) }
    }

    pub(super) fn run_rope_store(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        positions: &[u32],
        (inv_freq, scale): (&[f32], f32),
        qkv: &mut CudaMatrix,
        kv: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        let op = "rope_store";
        qkv.need(op, "qkv", rows.end, shape.qkv_width())?;
        kv.k.need_either(op, "keys", kv.first_row + rows.len(), shape.kv_width())?;
        kv.v.need_either(op, "values", kv.first_row + rows.len(), shape.kv_width())?;
        let is_plain = kv.k.fp8.is_none() && kv.v.fp8.is_none();
        require(op, positions.len() == rows.len(), &format!("{} positions", rows.len()), positions.len())?;
        let half = shape.head_dim / 2;
        require(op, inv_freq.len() == half, &format!("{half} frequencies"), inv_freq.len())?;
        require(
            op,
            shape.head_dim.is_multiple_of(16) && half <= MAX_PAIRS,
            "head_dim a multiple of 16, at most 256",
            shape.head_dim,
        )?;
        let mut frequencies = Frequencies { scale, radians: [0.0; MAX_PAIRS] };
        frequencies.radians[..half].copy_from_slice(inv_freq);
        let mut first = 0;
        while first < positions.len() {
            let (runs, count) = PositionRuns::new(&positions[first..]);
            let destination = kv.first_row + first;
            let [heads, kv_heads, head_dim] = [shape.heads, shape.kv_heads, shape.head_dim].map(|n| n as i32);
            let at = qkv.row(rows.start + first);
            let (k, v) = if is_plain { (kv.k.row(destination), kv.v.row(destination)) } else { (0, 0) };
            let parameters = parameters![runs, frequencies, heads, kv_heads, head_dim, at, k, v];
            // SAFETY: (1) parameters as in rope_store.cu; (2) matrices are borrowed.
            unsafe { self.stream.launch(&self.functions.rope_store, (count, 1, 1), 256, parameters) }?;
            first += count;
        }
        if is_plain {
            return Ok(());
        }
        let keys = qkv.row(rows.start) + (shape.q_width() * 2) as u64;
        let from = [keys, keys + (shape.kv_width() * 2) as u64];
        let rows = Rows { count: rows.len(), stride: qkv.cols };
        self.keep(shape.head_dim, &rows, &from, &[kv.k, kv.v], kv.first_row)
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
        if let Some(factors) = &dst.fp8 {
            let from = Rows { count: rows, stride: src.cols };
            return self.keep(src.cols / factors.heads, &from, &[src.row(src_row)], &[&*dst], dst_row);
        }
        // SAFETY: (1) checked above; `dst` is uniquely borrowed, so it is not `src`.
        unsafe { self.stream.copy(op, src.row(src_row), dst.row(dst_row), rows * src.cols * 2) }
    }

    pub(super) fn run_logits(
        &self,
        x: &CudaMatrix,
        row: usize,
        norm: &CudaWeight,
        epsilon: f32,
        head: &CudaWeight,
    ) -> Result<Vec<f32>, BackendError> {
        let logits = self.device_logits(x, row, norm, epsilon, head)?;
        self.read_scores(&logits)
    }

    pub(super) fn run_choose_token(
        &self,
        logits: &CudaScores,
        (temperature, top_p, draw): (f32, f32, f32),
    ) -> Result<Option<u32>, BackendError> {
        let op = "choose_token";
        let chosen = self.arena.take(op, 8)?;
        let (from, count, to) = (logits.row(0), logits.cols as i32, chosen.address());
        if temperature <= 0.0 {
            // SAFETY: (1) parameters as in choose.cu; (2) pieces stay allocated in stream order.
            unsafe { self.stream.launch(&self.functions.argmax, (1, 1, 1), 1024, parameters![from, count, to]) }?;
        } else {
            let sharpness = std::f32::consts::LOG2_E / temperature;
            let parameters = parameters![from, count, sharpness, top_p, draw, to];
            // SAFETY: (1), (2) as above.
            unsafe { self.stream.launch(&self.functions.draw_token, (1, 1, 1), 1024, parameters) }?;
        }
        let mut found = [0u32; 2];
        // SAFETY: (1) the piece has 8 bytes.
        unsafe { self.stream.download(op, chosen.address(), bytemuck::cast_slice_mut(&mut found)) }?;
        Ok((found[1] == u32::MAX).then_some(found[0]))
    }

    pub(super) fn device_logits(
        &self,
        x: &CudaMatrix,
        row: usize,
        norm: &CudaWeight,
        epsilon: f32,
        head: &CudaWeight,
    ) -> Result<CudaScores, BackendError> {
        let op = "logits";
        x.need(op, "x", row + 1, head.cols)?;
        norm.need(op, "norm", 1, head.cols)?;
        let normed = self.arena.take(op, head.cols * 2)?;
        self.run_rms_norm(1, x.row(row), norm, epsilon, normed.address())?;
        let logits = CudaScores::new(&self.arena, op, 1, head.rows)?;
        let (from, weights, cols, width, to) =
            (normed.address(), head.piece.address(), head.cols as i32, head.rows as i32, logits.row(0));
        let grid = ((head.rows * 32).div_ceil(WARPS_THREADS), 1, 1);
        let parameters = parameters![from, weights, cols, width, to];
        // SAFETY: (1) parameters as in gemv.cu; (2) pieces stay allocated in stream order.
        unsafe { self.stream.launch(&self.functions.gemv_f32, grid, WARPS_THREADS, parameters) }?;
        Ok(logits)
    }
}

impl PositionRuns {
    /// The first runs of ascending positions, as many as fit, and how many positions they are.
    fn new(positions: &[u32]) -> (Self, usize) {
        let mut runs = Self { count: 0, row: [0; MAX_RUNS], position: [0; MAX_RUNS] };
        for (i, &position) in positions.iter().enumerate() {
            let continues = i > 0 && Some(position) == positions[i - 1].checked_add(1);
            if continues {
                continue;
            }
            if runs.count as usize == MAX_RUNS {
                return (runs, i);
            }
            runs.row[runs.count as usize] = i as i32;
            runs.position[runs.count as usize] = position;
            runs.count += 1;
        }
        (runs, positions.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_cut_into_runs() {
        let (runs, count) = PositionRuns::new(&[7, 8, 9, 100, 101, 3]);
        assert_eq!((runs.count, count), (3, 6));
        assert_eq!((&runs.row[..3], &runs.position[..3]), (&[0, 3, 5][..], &[7, 100, 3][..]));
    }

    #[test]
    fn more_runs_than_fit_are_left_for_another_launch() {
        let positions: Vec<u32> = (0..100).map(|i| 2 * i).collect();
        let (runs, count) = PositionRuns::new(&positions);
        assert_eq!((runs.count as usize, count), (MAX_RUNS, MAX_RUNS));
    }
}
