//! The CPU backend: f32, a few threads per rank, matrix products by the `gemm` crate, attention in tiles.
//!
//! Invariant: whatever the number of threads, results are the same to the bit; no operation reads its output's old contents
//! unless it accumulates.

mod attention;
mod columns;
mod linear;
mod matrix;
mod mlp;
mod norm;
mod quantized;
mod rope;
mod scores;
mod select;
mod simd;
mod threads;
mod vector;
mod view;
mod weight;

use std::ops::Range;

pub use matrix::{Matrix, Rows, Scores};
pub use weight::Weight;

use super::{AttentionTask, Backend, BackendError, Head, HeadShape, KvMut, KvRef, Next, Wanted, WeightView};
use rope::Angles;
use threads::Threads;

/// The processor, with threads of its own.
pub struct Cpu {
    threads: Threads,
}

impl Cpu {
    /// A backend of `threads` threads (at least 1), the caller's among them.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        Ok(Self { threads: Threads::new(threads)? })
    }
}

/// An error of kind `Shape` unless `holds`; `detail` gives what was expected and what came.
fn check(op: &'static str, holds: bool, detail: impl FnOnce() -> (String, String)) -> Result<(), BackendError> {
    if holds {
        return Ok(());
    }
    let (expected, got) = detail();
    Err(BackendError::Shape { op, expected, got })
}

/// Heads that exist and share KV heads evenly.
fn check_shape(op: &'static str, shape: HeadShape) -> Result<(), BackendError> {
    let HeadShape { heads, kv_heads, head_dim } = shape;
    check(op, kv_heads > 0 && head_dim > 0 && heads > 0 && heads.is_multiple_of(kv_heads), || {
        ("heads a multiple of KV heads, neither empty".to_owned(), format!("{shape:?}"))
    })
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Scores = Scores;
    type Rows = Rows;
    type Weight = Weight;

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn weight(&self, view: WeightView<'_>) -> Result<Weight, BackendError> {
        Weight::load(&self.threads, &[view])
    }

    fn weight_stacked(&self, views: &[WeightView<'_>]) -> Result<Weight, BackendError> {
        Weight::load(&self.threads, views)
    }

    fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix, BackendError> {
        Matrix::allocate("matrix", rows, cols)
    }

    fn scores(&self, rows: usize, cols: usize) -> Result<Scores, BackendError> {
        Scores::allocate("scores", rows, cols)
    }

    fn embed(&self, table: &Weight, ids: &[u32], x: &mut Matrix) -> Result<(), BackendError> {
        norm::embed(table, ids, x)
    }

    fn rms_norm(
        &self,
        rows: usize,
        x: &Matrix,
        w: &Weight,
        epsilon: f32,
        out: &mut Matrix,
    ) -> Result<(), BackendError> {
        norm::rms_norm(&self.threads, rows, x, w, epsilon, out)
    }

    fn linear(
        &self,
        rows: usize,
        x: &Matrix,
        w: &Weight,
        bias: Option<&Weight>,
        accumulate: bool,
        out: &mut Matrix,
    ) -> Result<(), BackendError> {
        linear::linear(&self.threads, rows, x, w, bias, accumulate, out)
    }

    fn mlp(
        &self,
        rows: usize,
        h: &Matrix,
        gate_up: &Weight,
        down: &Weight,
        x: &mut Matrix,
    ) -> Result<(), BackendError> {
        mlp::mlp(&self.threads, rows, h, gate_up, down, x)
    }

    fn mlp_part(
        &self,
        rows: usize,
        h: &Matrix,
        gate_up: &Weight,
        down: &Weight,
        part: Range<usize>,
        out: &mut Scores,
        first_row: usize,
    ) -> Result<(), BackendError> {
        mlp::mlp_part(&self.threads, rows, h, (gate_up, down, part), (out, first_row))
    }

    fn add_partials(&self, rows: usize, count: usize, partials: &Scores, x: &mut Matrix) -> Result<(), BackendError> {
        mlp::add_partials(rows, count, partials, x)
    }

    fn rope_store(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        qkv: &mut Matrix,
        kv: KvMut<'_, Matrix>,
    ) -> Result<(), BackendError> {
        rope::rope_store(&self.threads, shape, rows, &Angles { positions, inv_freq, scale }, qkv, kv)
    }

    fn retaining_scores(
        &self,
        rows: usize,
        qkv: &Matrix,
        w1: &Weight,
        w2: &Weight,
        out: &mut Scores,
    ) -> Result<(), BackendError> {
        scores::retaining_scores(&self.threads, rows, qkv, w1, w2, out)
    }

    fn query_aware_scores(
        &self,
        shape: HeadShape,
        queries: Range<usize>,
        q_qkv: &Matrix,
        rows: usize,
        k: &Matrix,
        out: &mut Scores,
    ) -> Result<(), BackendError> {
        scores::query_aware_scores(&self.threads, shape, queries, q_qkv, rows, k, out)
    }

    fn set_scores(&self, values: &[f32], out: &mut Scores) -> Result<(), BackendError> {
        scores::set_scores(values, out)
    }

    fn top_k(
        &self,
        scores: &Scores,
        before: Range<usize>,
        candidates: Range<usize>,
        excluded: usize,
        k: usize,
        pool: bool,
    ) -> Result<Rows, BackendError> {
        select::top_k(&self.threads, scores, before, candidates, excluded, k, pool)
    }

    fn gather_kv(
        &self,
        shape: HeadShape,
        chosen: &Rows,
        source_offset: usize,
        src: KvRef<'_, Matrix>,
        dst: KvMut<'_, Matrix>,
    ) -> Result<(), BackendError> {
        select::gather_kv(shape, chosen, source_offset, src, dst)
    }

    fn attention(
        &self,
        shape: HeadShape,
        q: &Matrix,
        sources: &[KvRef<'_, Matrix>],
        tasks: &[AttentionTask],
        out: &mut Matrix,
        lse: Option<&mut Scores>,
    ) -> Result<(), BackendError> {
        attention::attention(&self.threads, shape, q, sources, tasks, out, lse)
    }

    fn merge(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        out: &mut Matrix,
        lse: &mut Scores,
        part: &Matrix,
        part_lse: &Scores,
        part_first_row: usize,
    ) -> Result<(), BackendError> {
        attention::merge(&self.threads, shape, rows, out, lse, (part, part_lse, part_first_row))
    }

    fn copy_rows(
        &self,
        src: &Matrix,
        src_row: usize,
        rows: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        let cols = src.cols();
        linear::check_rows("copy_rows", "src", src_row + rows, cols, src)?;
        linear::check_rows("copy_rows", "dst", dst_row + rows, cols, dst)?;
        let from = &src.data()[src_row * cols..(src_row + rows) * cols];
        dst.data_mut()[dst_row * cols..(dst_row + rows) * cols].copy_from_slice(from);
        Ok(())
    }

    fn stack_columns(
        &self,
        src: &Matrix,
        src_at: (usize, usize),
        rows: usize,
        groups: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        columns::stack(src, src_at, rows, groups, dst, dst_row)
    }

    fn unstack_columns(
        &self,
        src: &Matrix,
        src_row: usize,
        rows: usize,
        groups: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        columns::unstack(src, src_row, rows, groups, dst, dst_row)
    }

    fn quantized_kv(&self, shape: HeadShape, rows: usize) -> Result<Matrix, BackendError> {
        quantized::matrix(shape, rows)
    }

    fn quantize_kv(
        &self,
        shape: HeadShape,
        kv: KvRef<'_, Matrix>,
        row: usize,
        rows: usize,
        out: &mut Matrix,
        out_row: usize,
    ) -> Result<(), BackendError> {
        quantized::quantize(shape, kv, row, rows, out, out_row)
    }

    fn restore_kv(
        &self,
        shape: HeadShape,
        from: &Matrix,
        row: usize,
        rows: usize,
        kv: KvMut<'_, Matrix>,
    ) -> Result<(), BackendError> {
        quantized::restore(shape, from, row, rows, kv)
    }

    fn logits(
        &self,
        rows: usize,
        x: &Matrix,
        head: &Head<'_, Weight>,
        part: Range<usize>,
        out: &mut Scores,
        first_row: usize,
    ) -> Result<(), BackendError> {
        norm::logits(&self.threads, rows, x, head, part, (out, first_row))
    }

    fn join_columns(&self, rows: usize, count: usize, parts: &Scores, out: &mut Scores) -> Result<(), BackendError> {
        columns::join(rows, count, parts, out)
    }

    /// The choice is the caller's.
    fn next_tokens(&self, logits: &Scores, wanted: &[Wanted]) -> Result<Vec<Next>, BackendError> {
        linear::check_rows("next_tokens", "logits", wanted.len(), logits.cols(), logits)?;
        Ok((0..wanted.len()).map(|row| Next::Logits(logits.row(row).to_vec())).collect())
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
