//! The CPU backend with a fault at a chosen call, and an account of what is allocated and multiplied.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use apbd::backend::cpu::Cpu;
use apbd::backend::{
    AttentionTask, Backend, BackendError, Head, HeadShape, KvMut, KvRef, Mask, Next, Wanted, WeightView,
};

/// What happens at the chosen call.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Error,
    Panic,
    NonFinite,
}

/// A backend that counts.
pub struct Instrumented {
    inner: Cpu,
    fault: Option<(usize, Fault)>,
    calls: AtomicUsize,
    /// Bytes allocated before the first `synchronize`, and after it.
    allocated: [AtomicU64; 2],
    phase: AtomicUsize,
    /// Floating-point operations of products, scores and attention before the first `synchronize`, and after it.
    flops: [AtomicU64; 2],
}

impl Instrumented {
    /// `fault` comes at the call with that number, counted over all operations.
    pub fn new(inner: Cpu, fault: Option<(usize, Fault)>) -> Self {
        let zero = || AtomicU64::new(0);
        let (allocated, flops) = ([zero(), zero()], [zero(), zero()]);
        Self { inner, fault, calls: AtomicUsize::new(0), allocated, phase: AtomicUsize::new(0), flops }
    }

    /// Floating-point operations during prefill, and after it.
    pub fn flops(&self) -> [u64; 2] {
        self.flops.each_ref().map(|flops| flops.load(Ordering::SeqCst))
    }

    /// Bytes allocated during prefill, and after it.
    pub fn allocated(&self) -> [u64; 2] {
        self.allocated.each_ref().map(|bytes| bytes.load(Ordering::SeqCst))
    }

    /// Operations so far.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn count(&self, op: &'static str) -> Result<(), BackendError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Some((at, Fault::Error)) if at == call => Err(BackendError::Device { op, reason: "injected".to_owned() }),
            Some((at, Fault::Panic)) if at == call => panic!("injected"),
            _ => Ok(()),
        }
    }

    /// A multiplication and an addition for each of so many terms.
    fn multiply(&self, terms: usize) {
        self.flops[self.phase.load(Ordering::SeqCst)].fetch_add(2 * terms as u64, Ordering::SeqCst);
    }

    fn allocate(&self, rows: usize, cols: usize) {
        self.allocated[self.phase.load(Ordering::SeqCst)].fetch_add(4 * (rows * cols) as u64, Ordering::SeqCst);
    }
}

/// Pairs of a query and a key that it sees; causal segments are aligned at the bottom right.
fn visible_pairs(task: &AttentionTask) -> usize {
    let queries = task.queries.len();
    let of_segment = |(rows, mask): (usize, Mask)| match mask {
        Mask::Full => queries * rows,
        Mask::Causal => queries * rows - queries * queries.saturating_sub(1) / 2,
    };
    task.segments.iter().map(|segment| of_segment((segment.rows.len(), segment.mask))).sum()
}

type Done = Result<(), BackendError>;
type Matrix = <Cpu as Backend>::Matrix;
type Scores = <Cpu as Backend>::Scores;
type Rows = <Cpu as Backend>::Rows;
type Weight = <Cpu as Backend>::Weight;

impl Backend for Instrumented {
    type Matrix = Matrix;
    type Scores = Scores;
    type Rows = Rows;
    type Weight = Weight;

    fn name(&self) -> String {
        self.inner.name()
    }
    fn weight(&self, view: WeightView<'_>) -> Result<Weight, BackendError> {
        self.inner.weight(view)
    }
    fn weight_stacked(&self, views: &[WeightView<'_>]) -> Result<Weight, BackendError> {
        self.inner.weight_stacked(views)
    }
    fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix, BackendError> {
        self.count("matrix")?;
        self.allocate(rows, cols);
        self.inner.matrix(rows, cols)
    }
    fn scores(&self, rows: usize, cols: usize) -> Result<Scores, BackendError> {
        self.count("scores")?;
        self.allocate(rows, cols);
        self.inner.scores(rows, cols)
    }
    fn embed(&self, table: &Weight, ids: &[u32], x: &mut Matrix) -> Done {
        self.count("embed")?;
        self.inner.embed(table, ids, x)
    }
    fn rms_norm(&self, rows: usize, x: &Matrix, w: &Weight, epsilon: f32, out: &mut Matrix) -> Done {
        self.count("rms_norm")?;
        self.inner.rms_norm(rows, x, w, epsilon, out)
    }
    fn linear(&self, rows: usize, x: &Matrix, w: &Weight, bias: Option<&Weight>, add: bool, out: &mut Matrix) -> Done {
        self.count("linear")?;
        self.multiply(rows * w.rows() * w.cols());
        self.inner.linear(rows, x, w, bias, add, out)
    }
    fn mlp(&self, rows: usize, h: &Matrix, gate_up: &Weight, down: &Weight, x: &mut Matrix) -> Done {
        self.count("mlp")?;
        self.multiply(rows * (gate_up.rows() * gate_up.cols() + down.rows() * down.cols()));
        self.inner.mlp(rows, h, gate_up, down, x)
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
    ) -> Done {
        self.count("mlp_part")?;
        self.multiply(rows * part.len() * (2 * gate_up.cols() + down.rows()));
        self.inner.mlp_part(rows, h, gate_up, down, part, out, first_row)
    }
    fn add_partials(&self, rows: usize, count: usize, partials: &Scores, x: &mut Matrix) -> Done {
        self.count("add_partials")?;
        self.inner.add_partials(rows, count, partials, x)
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
    ) -> Done {
        self.count("rope_store")?;
        self.inner.rope_store(shape, rows, positions, inv_freq, scale, qkv, kv)
    }
    fn retaining_scores(&self, rows: usize, qkv: &Matrix, w1: &Weight, w2: &Weight, out: &mut Scores) -> Done {
        self.count("retaining_scores")?;
        self.multiply(rows * (w1.rows() * w1.cols() + w2.rows() * w2.cols()));
        self.inner.retaining_scores(rows, qkv, w1, w2, out)
    }
    fn query_aware_scores(
        &self,
        shape: HeadShape,
        queries: Range<usize>,
        q_qkv: &Matrix,
        rows: usize,
        k: &Matrix,
        out: &mut Scores,
    ) -> Done {
        self.count("query_aware_scores")?;
        self.multiply(queries.len() * rows * shape.q_width());
        self.inner.query_aware_scores(shape, queries, q_qkv, rows, k, out)
    }
    fn set_scores(&self, values: &[f32], out: &mut Scores) -> Done {
        self.count("set_scores")?;
        self.inner.set_scores(values, out)
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
        self.count("top_k")?;
        self.inner.top_k(scores, before, candidates, excluded, k, pool)
    }
    fn gather_kv(
        &self,
        shape: HeadShape,
        chosen: &Rows,
        offset: usize,
        src: KvRef<'_, Matrix>,
        dst: KvMut<'_, Matrix>,
    ) -> Done {
        self.count("gather_kv")?;
        self.inner.gather_kv(shape, chosen, offset, src, dst)
    }
    fn attention(
        &self,
        shape: HeadShape,
        q: &Matrix,
        sources: &[KvRef<'_, Matrix>],
        tasks: &[AttentionTask],
        out: &mut Matrix,
        lse: Option<&mut Scores>,
    ) -> Done {
        self.count("attention")?;
        // Scores and weighted values.
        self.multiply(2 * shape.q_width() * tasks.iter().map(visible_pairs).sum::<usize>());
        self.inner.attention(shape, q, sources, tasks, out, lse)
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
    ) -> Done {
        self.count("merge")?;
        self.inner.merge(shape, rows, out, lse, part, part_lse, part_first_row)
    }
    fn merge_stacked(
        &self,
        shape: HeadShape,
        rows: usize,
        count: usize,
        parts: &Matrix,
        part_lse: &Scores,
        out: &mut Matrix,
    ) -> Done {
        self.count("merge_stacked")?;
        self.inner.merge_stacked(shape, rows, count, parts, part_lse, out)
    }
    fn copy_rows(&self, src: &Matrix, src_row: usize, rows: usize, dst: &mut Matrix, dst_row: usize) -> Done {
        self.count("copy_rows")?;
        self.inner.copy_rows(src, src_row, rows, dst, dst_row)
    }
    fn stack_columns(
        &self,
        src: &Matrix,
        src_at: (usize, usize),
        rows: usize,
        groups: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Done {
        self.count("stack_columns")?;
        self.inner.stack_columns(src, src_at, rows, groups, dst, dst_row)
    }
    fn unstack_columns(
        &self,
        src: &Matrix,
        src_row: usize,
        rows: usize,
        groups: usize,
        dst: &mut Matrix,
        dst_row: usize,
    ) -> Done {
        self.count("unstack_columns")?;
        self.inner.unstack_columns(src, src_row, rows, groups, dst, dst_row)
    }
    fn quantized_kv(&self, shape: HeadShape, rows: usize) -> Result<Matrix, BackendError> {
        self.count("quantized_kv")?;
        self.allocate(rows, shape.quantized_row_bytes() / 4);
        self.inner.quantized_kv(shape, rows)
    }
    fn quantize_kv(
        &self,
        shape: HeadShape,
        kv: KvRef<'_, Matrix>,
        row: usize,
        rows: usize,
        out: &mut Matrix,
        out_row: usize,
    ) -> Done {
        self.count("quantize_kv")?;
        self.inner.quantize_kv(shape, kv, row, rows, out, out_row)
    }
    fn restore_kv(&self, shape: HeadShape, from: &Matrix, row: usize, rows: usize, kv: KvMut<'_, Matrix>) -> Done {
        self.count("restore_kv")?;
        self.inner.restore_kv(shape, from, row, rows, kv)
    }
    fn logits(
        &self,
        rows: usize,
        x: &Matrix,
        head: &Head<'_, Weight>,
        part: Range<usize>,
        out: &mut Scores,
        first_row: usize,
    ) -> Done {
        self.count("logits")?;
        self.inner.logits(rows, x, head, part, out, first_row)
    }
    fn join_columns(&self, rows: usize, count: usize, parts: &Scores, out: &mut Scores) -> Done {
        self.count("join_columns")?;
        self.inner.join_columns(rows, count, parts, out)
    }
    fn next_tokens(&self, logits: &Scores, wanted: &[Wanted]) -> Result<Vec<Next>, BackendError> {
        let mut next = self.inner.next_tokens(logits, wanted)?;
        if let (Some((_, Fault::NonFinite)), Some(Next::Logits(logits))) = (&self.fault, next.first_mut()) {
            logits[1] = f32::NAN;
        }
        Ok(next)
    }
    fn synchronize(&self) -> Done {
        self.count("synchronize")?;
        self.phase.store(1, Ordering::SeqCst);
        self.inner.synchronize()
    }
}
