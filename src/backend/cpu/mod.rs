//! The CPU backend: f32, blocked, on a pool of threads of its own. The embedded default, and what the other backends are compared with.
//!
//! Invariant: results depend on shapes and values alone, not on the number of threads.

mod attention;
mod gemm;
mod linear;
mod matrix;
mod rows;
mod selection;
#[cfg(test)]
mod tests;
mod vector;
mod weight;

use std::ops::Range;

use super::{AttentionTask, Backend, BackendError, HeadShape, KvMut, KvRef, WeightView};
pub use matrix::{Matrix, Rows, Scores};

/// A CPU rank. Operations are done when they return.
pub struct Cpu {
    pool: rayon::ThreadPool,
}

impl Cpu {
    /// A backend with `threads` threads of its own; 0: as many as there are cores.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("apbd-cpu-{i}"))
            .build()
            .map(|pool| Self { pool })
            .map_err(|error| BackendError::Unavailable(format!("the CPU backend could not start its threads: {error}")))
    }

    /// Threads of this backend.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Scores = Scores;
    type Rows = Rows;
    type Weight = Matrix;

    fn name(&self) -> String {
        format!("cpu ({} threads)", self.threads())
    }

    fn weight(&self, view: WeightView<'_>) -> Result<Matrix, BackendError> {
        weight::load(&[view])
    }

    fn weight_stacked(&self, views: &[WeightView<'_>]) -> Result<Matrix, BackendError> {
        weight::load(views)
    }

    fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix, BackendError> {
        Matrix::allocate("matrix", rows, cols)
    }

    fn scores(&self, rows: usize, cols: usize) -> Result<Scores, BackendError> {
        Scores::allocate("scores", rows, cols)
    }

    fn embed(&self, table: &Matrix, ids: &[u32], x: &mut Matrix) -> Result<(), BackendError> {
        x.expect("embed", ids.len(), table.cols())?;
        rows::embed(table, ids, x)
    }

    fn rms_norm(
        &self,
        rows: usize,
        x: &Matrix,
        w: &Matrix,
        epsilon: f32,
        out: &mut Matrix,
    ) -> Result<(), BackendError> {
        x.expect("rms_norm", rows, w.data().len())?;
        out.expect("rms_norm", rows, x.cols())?;
        self.pool.install(|| rows::rms_norm(rows, x, w, epsilon, out));
        Ok(())
    }

    fn linear(
        &self,
        rows: usize,
        x: &Matrix,
        w: &Matrix,
        bias: Option<&Matrix>,
        accumulate: bool,
        out: &mut Matrix,
    ) -> Result<(), BackendError> {
        x.expect("linear", rows, w.cols())?;
        out.expect("linear", rows, w.rows())?;
        if let Some(bias) = bias {
            bias.expect("linear bias", 1, w.rows())?;
        }
        self.pool.install(|| linear::linear(rows, x, w, bias, accumulate, out));
        Ok(())
    }

    fn mlp(
        &self,
        rows: usize,
        h: &Matrix,
        gate_up: &Matrix,
        down: &Matrix,
        x: &mut Matrix,
    ) -> Result<(), BackendError> {
        h.expect("mlp", rows, gate_up.cols())?;
        x.expect("mlp", rows, down.rows())?;
        gate_up.expect("mlp gate and up", 2 * down.cols(), h.cols())?;
        self.pool.install(|| linear::mlp(rows, h, gate_up, down, x));
        Ok(())
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
        qkv.expect("rope_store", rows.end, shape.qkv_width())?;
        kv.k.expect("rope_store keys", kv.first_row + rows.len(), shape.kv_width())?;
        kv.v.expect("rope_store values", kv.first_row + rows.len(), shape.kv_width())?;
        same("rope_store positions", rows.len(), positions.len())?;
        same("rope_store frequencies", shape.head_dim / 2, inv_freq.len())?;
        let angles = rows::Angles { positions, inv_freq, scale };
        self.pool.install(|| rows::rope_store(shape, rows, &angles, qkv, kv));
        Ok(())
    }

    fn retaining_scores(
        &self,
        rows: usize,
        qkv: &Matrix,
        w1: &Matrix,
        w2: &Matrix,
        out: &mut Scores,
    ) -> Result<(), BackendError> {
        qkv.expect("retaining_scores", rows, w1.cols())?;
        w2.expect("retaining_scores w2", 1, w1.rows())?;
        room("retaining_scores", out, w2.rows(), rows)?;
        self.pool.install(|| linear::retaining_scores(rows, qkv, w1, w2, out));
        Ok(())
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
        expect_queries("query_aware_scores", q_qkv, queries.end, shape)?;
        k.expect("query_aware_scores keys", rows, shape.kv_width())?;
        room("query_aware_scores", out, shape.kv_heads, rows)?;
        self.pool.install(|| selection::query_aware(shape, queries, q_qkv, rows, k, out));
        Ok(())
    }

    fn set_scores(&self, values: &[f32], out: &mut Scores) -> Result<(), BackendError> {
        same("set_scores", out.data().len(), values.len())?;
        out.data_mut().copy_from_slice(values);
        Ok(())
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
        room("top_k", scores, scores.rows(), before.end.max(candidates.end))?;
        if excluded + k > candidates.len() {
            let got = format!("{} candidates, {excluded} of them excluded", candidates.len());
            return Err(BackendError::Shape { op: "top_k", expected: format!("{k} to choose"), got });
        }
        let candidates = selection::Candidates { before, columns: candidates, excluded };
        Ok(self.pool.install(|| selection::top_k(scores, &candidates, k, pool)))
    }

    fn gather_kv(
        &self,
        shape: HeadShape,
        chosen: &Rows,
        source_offset: usize,
        src: KvRef<'_, Matrix>,
        dst: KvMut<'_, Matrix>,
    ) -> Result<(), BackendError> {
        same("gather_kv heads", shape.kv_heads, chosen.chosen().len())?;
        let last = chosen.chosen().iter().filter_map(|rows| rows.last()).max();
        let rows = last.map_or(0, |&last| last as usize + 1);
        let first = chosen.chosen().iter().filter_map(|rows| rows.first()).min();
        if first.is_some_and(|&first| (first as usize) < source_offset) {
            let expected = format!("columns from {source_offset}");
            return Err(BackendError::Shape { op: "gather_kv", expected, got: format!("{first:?}") });
        }
        let k = chosen.chosen().iter().map(Vec::len).max().unwrap_or(0);
        for (from, to) in [(src.k, &*dst.k), (src.v, &*dst.v)] {
            from.expect("gather_kv source", rows.saturating_sub(source_offset), shape.kv_width())?;
            to.expect("gather_kv destination", dst.first_row + k, shape.kv_width())?;
        }
        selection::gather(shape, chosen, source_offset, &src, dst);
        Ok(())
    }

    fn attention(
        &self,
        shape: HeadShape,
        q: &Matrix,
        sources: &[KvRef<'_, Matrix>],
        tasks: &[AttentionTask],
        out: &mut Matrix,
        mut lse: Option<&mut Scores>,
    ) -> Result<(), BackendError> {
        for task in tasks {
            expect_queries("attention queries", q, task.queries.end, shape)?;
            out.expect("attention output", task.queries.end, shape.q_width())?;
            if let Some(lse) = lse.as_deref_mut() {
                lse.expect("attention log-sum-exps", task.queries.end, shape.heads)?;
            }
            for segment in &task.segments {
                let Some(source) = sources.get(segment.source) else {
                    let expected = format!("a source below {}", sources.len());
                    return Err(BackendError::Shape { op: "attention", expected, got: segment.source.to_string() });
                };
                source.k.expect("attention keys", segment.rows.end, shape.kv_width())?;
                source.v.expect("attention values", segment.rows.end, shape.kv_width())?;
            }
        }
        let inputs = attention::Inputs { shape, q, sources, tasks };
        self.pool.install(|| attention::attention(&inputs, out, lse.map(|lse| &mut **lse)));
        Ok(())
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
        out.expect("merge", rows.end, shape.q_width())?;
        lse.expect("merge log-sum-exps", rows.end, shape.heads)?;
        part.expect("merge part", part_first_row + rows.len(), shape.q_width())?;
        part_lse.expect("merge part's log-sum-exps", part_first_row + rows.len(), shape.heads)?;
        attention::merge(shape, rows, (out, lse), (part, part_lse), part_first_row);
        Ok(())
    }

    fn copy_rows(
        &self,
        src: &Matrix,
        src_row: usize,
        rows: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        src.expect("copy_rows source", src_row + rows, dst.cols())?;
        dst.expect("copy_rows destination", dst_row + rows, src.cols())?;
        dst.rows_in_mut(dst_row..dst_row + rows).copy_from_slice(src.rows_in(src_row..src_row + rows));
        Ok(())
    }

    fn logits(
        &self,
        x: &Matrix,
        row: usize,
        norm: &Matrix,
        epsilon: f32,
        head: &Matrix,
    ) -> Result<Vec<f32>, BackendError> {
        x.expect("logits", row + 1, head.cols())?;
        norm.expect("logits norm", 1, head.cols())?;
        Ok(self.pool.install(|| linear::logits(x.row(row), norm, epsilon, head)))
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

fn same(op: &'static str, expected: usize, got: usize) -> Result<(), BackendError> {
    if expected == got {
        return Ok(());
    }
    Err(BackendError::Shape { op, expected: expected.to_string(), got: got.to_string() })
}

/// An error unless `scores` has `rows` rows of at least `cols` columns.
fn room(op: &'static str, scores: &Scores, rows: usize, cols: usize) -> Result<(), BackendError> {
    if scores.rows() >= rows && scores.cols() >= cols {
        return Ok(());
    }
    let got = format!("[{}, {}]", scores.rows(), scores.cols());
    Err(BackendError::Shape { op, expected: format!("[{rows}, at least {cols}]"), got })
}

/// Queries may stand alone or at the start of packed rows.
fn expect_queries(op: &'static str, q: &Matrix, rows: usize, shape: HeadShape) -> Result<(), BackendError> {
    let cols = if q.cols() == shape.qkv_width() { shape.qkv_width() } else { shape.q_width() };
    q.expect(op, rows, cols)
}
