//! The CUDA backend: bf16 activations, our own kernels and cuBLASLt on one stream of one device.
//!
//! All device memory is taken at the start ([`CudaOptions::memory_bytes`]) and handed out from there; libraries are opened at run time.
//! Invariant: everything is computed on one stream, in order; a piece of memory given back is safe to hand out again at once, because what goes
//! on beside that stream (a [`Lane`]) is waited for before its memory is given back.

mod arena;
mod attention;
mod attention_kernels;
mod attention_plan;
mod blas;
mod columns;
mod driver;
mod kept;
mod lane;
mod layers;
mod links;
mod matrix;
mod measure;
mod mlp;
mod modules;
mod next;
mod pace;
mod partials;
mod peers;
mod products;
mod profile;
mod quantized;
mod rope;
mod selection;
mod weights;

use std::ops::Range;
use std::sync::{Arc, Mutex};

pub use attention_kernels::AttentionPath;
pub use lane::{Extent, Lane, Mark};
pub use links::in_ring_order;
pub use matrix::{CudaMatrix, CudaRows, CudaScores, CudaWeight};
pub use peers::Peers;
pub use products::ProductPath;

use super::{AttentionTask, Backend, BackendError, Head, HeadShape, KvMut, KvRef, Next, Wanted, WeightView};
use arena::Arena;
use attention::{Attention, Call};
use blas::Blas;
use driver::{Context, Stream};
use modules::{Functions, Modules};
use products::Skinny;

/// Device memory left to the driver and to cuBLASLt's own needs.
const RESERVED_BYTES: usize = 768 << 20;

/// What the profile calls the time in which the device has nothing to compute until a collective has come.
pub const WAITING: &str = "communication";

/// Bytes of an element of an activation: a bf16.
pub const ELEMENT_BYTES: usize = size_of::<half::bf16>();

/// How to use a device.
#[derive(Debug, Clone, Copy, Default)]
pub struct CudaOptions {
    /// Device memory to take; absent: what is free, less a reserve.
    pub memory_bytes: Option<usize>,
    /// What other libraries (NCCL) will want beside that reserve.
    pub others_bytes: usize,
    /// Kernels to use for tasks of many queries.
    pub attention: AttentionPath,
    /// How keys and values are kept for decode.
    pub kv_cache: KvCacheType,
    /// Who takes products of few rows.
    pub products: ProductPath,
}

/// Element type of the keys and values that are kept. Prefill itself always attends to them in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheType {
    /// As they are computed.
    #[default]
    Bf16,
    /// FP8 (e4m3), with a power of two as the scale of every row and KV head.
    Fp8,
}

impl KvCacheType {
    /// Bytes of `elements` elements in heads of `head_dim`.
    pub fn bytes(self, elements: usize, head_dim: usize) -> usize {
        match self {
            Self::Bf16 => ELEMENT_BYTES * elements,
            Self::Fp8 => elements + elements / head_dim,
        }
    }
}

/// What of a model decides how much the operations need for themselves.
#[derive(Debug, Clone, Copy)]
pub struct ScratchShape {
    /// Heads of an attention layer.
    pub heads: HeadShape,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Hidden width of a retaining head; 0 without.
    pub head_width: usize,
}

/// One GPU.
pub struct Cuda {
    // In the order of their release: what has been handed out before what it came from.
    attention: Attention,
    blas: Blas,
    staging: Mutex<Option<weights::Staging>>,
    functions: Functions,
    skinny: Skinny,
    pace: pace::Pace,
    profile: profile::Profile,
    arena: Arc<Arena>,
    stream: Stream,
    context: Arc<Context>,
    ordinal: usize,
    kv_cache: KvCacheType,
    products: ProductPath,
}

impl Cuda {
    /// Opens the `ordinal`-th device. `Unavailable` says what is missing: driver, device, library, or a kernel for it.
    pub fn open(ordinal: usize, options: &CudaOptions) -> Result<Self, BackendError> {
        let context = Context::open(ordinal)?;
        let modules = Modules::load(&context)?;
        let (functions, skinny) = (Functions::new(&modules)?, Skinny::new(&modules)?);
        let attention = Attention::new(&modules, context.multiprocessors, options.attention)?;
        let stream = Stream::new(&context)?;
        let (free, _) = context.memory()?;
        let spared = RESERVED_BYTES + options.others_bytes;
        let arena = Arena::new(&context, options.memory_bytes.unwrap_or(free.saturating_sub(spared)))?;
        let blas = Blas::new(&arena)?;
        Ok(Self {
            attention,
            blas,
            staging: Mutex::new(None),
            functions,
            skinny,
            pace: pace::Pace::default(),
            profile: profile::Profile::default(),
            arena,
            stream,
            context,
            ordinal,
            kv_cache: options.kv_cache,
            products: options.products,
        })
    }

    /// The device's own name.
    pub fn device_name(&self) -> &str {
        &self.context.name
    }

    /// The device's number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Bytes that one operation takes at most, beside its operands; operations give them back when they end.
    pub fn scratch_bytes(&self, shape: &ScratchShape) -> u64 {
        let mlp = mlp::MLP_ROWS * 3 * shape.intermediate * 2;
        let scores = selection::SCORE_ROWS * shape.head_width * 4;
        let partials = self.attention.most_partial_bytes(shape.heads.head_dim);
        [mlp, scores, partials].into_iter().max().unwrap_or(0) as u64
    }

    /// How keys and values are kept.
    pub fn kv_cache(&self) -> KvCacheType {
        self.kv_cache
    }

    /// Bytes that were in use at most since [`Cuda::watch_memory`], weights included.
    pub fn peak_bytes(&self) -> usize {
        self.arena.peak_bytes()
    }

    /// Begins to watch the peak of memory anew.
    pub fn watch_memory(&self) {
        self.arena.watch();
    }

    /// Bytes that matrices can still be made of.
    pub fn free_bytes(&self) -> usize {
        self.arena.free_bytes()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is under way uses memory that is about to be freed. There is nobody left to act on a failure.
        let _ = self.stream.synchronize("close");
    }
}

impl Backend for Cuda {
    type Matrix = CudaMatrix;
    type Scores = CudaScores;
    type Rows = CudaRows;
    type Weight = CudaWeight;

    fn name(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    fn weight(&self, view: WeightView<'_>) -> Result<CudaWeight, BackendError> {
        self.load_weight(&[view])
    }

    fn weight_stacked(&self, views: &[WeightView<'_>]) -> Result<CudaWeight, BackendError> {
        self.load_weight(views)
    }

    fn matrix(&self, rows: usize, cols: usize) -> Result<CudaMatrix, BackendError> {
        CudaMatrix::new(&self.arena, "matrix", rows, cols)
    }

    fn kv_matrix(&self, shape: HeadShape, rows: usize) -> Result<CudaMatrix, BackendError> {
        match self.kv_cache {
            KvCacheType::Bf16 => self.matrix(rows, shape.kv_width()),
            KvCacheType::Fp8 => CudaMatrix::in_fp8(&self.arena, "kv_matrix", rows, shape.kv_width(), shape.kv_heads),
        }
    }

    fn scores(&self, rows: usize, cols: usize) -> Result<CudaScores, BackendError> {
        CudaScores::new(&self.arena, "scores", rows, cols)
    }

    fn embed(&self, table: &CudaWeight, ids: &[u32], x: &mut CudaMatrix) -> Result<(), BackendError> {
        self.mark("embed")?;
        self.run_embed(table, ids, x)
    }

    fn rms_norm(
        &self,
        rows: usize,
        x: &CudaMatrix,
        w: &CudaWeight,
        epsilon: f32,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        self.mark("rms_norm")?;
        x.need("rms_norm", "x", rows, w.cols)?;
        out.need("rms_norm", "out", rows, w.cols)?;
        self.run_rms_norm(rows, x.row(0), w, epsilon, out.row(0))
    }

    fn linear(
        &self,
        rows: usize,
        x: &CudaMatrix,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        accumulate: bool,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        self.mark(if accumulate { "linear_add" } else { "linear" })?;
        self.run_linear(rows, x, w, bias, accumulate, out)
    }

    fn mlp(
        &self,
        rows: usize,
        h: &CudaMatrix,
        gate_up: &CudaWeight,
        down: &CudaWeight,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        self.mark("mlp")?;
        self.run_mlp(rows, h, gate_up, down, x)
    }

    fn mlp_part(
        &self,
        rows: usize,
        h: &CudaMatrix,
        gate_up: &CudaWeight,
        down: &CudaWeight,
        part: Range<usize>,
        out: &mut CudaScores,
        first_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("mlp")?;
        self.run_mlp_part(rows, h, (gate_up, down, part), (out, first_row))
    }

    fn add_partials(
        &self,
        rows: usize,
        count: usize,
        partials: &CudaScores,
        x: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        self.mark("add_partials")?;
        self.run_add_partials(rows, count, partials, x)
    }

    fn rope_store(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        qkv: &mut CudaMatrix,
        kv: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        self.mark("rope_store")?;
        self.run_rope_store(shape, rows, positions, (inv_freq, scale), qkv, kv)
    }

    fn rope_store_each(
        &self,
        shape: HeadShape,
        positions: &[u32],
        inv_freq: &[f32],
        scale: f32,
        qkv: &mut CudaMatrix,
        places: Vec<KvMut<'_, CudaMatrix>>,
    ) -> Result<(), BackendError> {
        self.mark("rope_store")?;
        self.run_rope_store_each(shape, positions, (inv_freq, scale), qkv, &places)
    }

    fn retaining_scores(
        &self,
        rows: usize,
        qkv: &CudaMatrix,
        w1: &CudaWeight,
        w2: &CudaWeight,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        self.mark("retaining_scores")?;
        self.run_retaining_scores(rows, qkv, w1, w2, out)
    }

    fn query_aware_scores(
        &self,
        shape: HeadShape,
        queries: Range<usize>,
        q_qkv: &CudaMatrix,
        rows: usize,
        k: &CudaMatrix,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        self.mark("query_aware_scores")?;
        self.run_query_aware_scores(shape, queries, q_qkv, rows, k, out)
    }

    fn set_scores(&self, values: &[f32], out: &mut CudaScores) -> Result<(), BackendError> {
        self.mark("set_scores")?;
        self.run_set_scores(values, out)
    }

    fn top_k(
        &self,
        scores: &CudaScores,
        before: Range<usize>,
        candidates: Range<usize>,
        excluded: usize,
        k: usize,
        pool: bool,
    ) -> Result<CudaRows, BackendError> {
        self.mark("top_k")?;
        self.run_top_k(scores, before, candidates, excluded, k, pool)
    }

    fn gather_kv(
        &self,
        shape: HeadShape,
        chosen: &CudaRows,
        source_offset: usize,
        src: KvRef<'_, CudaMatrix>,
        dst: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        self.mark("gather_kv")?;
        self.run_gather_kv(shape, chosen, source_offset, src, dst)
    }

    fn attention(
        &self,
        shape: HeadShape,
        q: &CudaMatrix,
        sources: &[KvRef<'_, CudaMatrix>],
        tasks: &[AttentionTask],
        out: &mut CudaMatrix,
        lse: Option<&mut CudaScores>,
    ) -> Result<(), BackendError> {
        self.mark("attention")?;
        let call = Call { shape, q, sources, out, lse: lse.as_deref() };
        self.attention.run(&self.stream, &self.arena, &call, tasks)
    }

    fn merge(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        out: &mut CudaMatrix,
        lse: &mut CudaScores,
        part: &CudaMatrix,
        part_lse: &CudaScores,
        part_first_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("merge")?;
        self.run_merge(shape, rows, out, lse, (part, part_lse, part_first_row))
    }

    fn merge_stacked(
        &self,
        shape: HeadShape,
        rows: usize,
        count: usize,
        parts: &CudaMatrix,
        part_lse: &CudaScores,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        self.mark("merge_stacked")?;
        self.run_merge_stacked(shape, rows, count, parts, part_lse, out)
    }

    fn copy_rows(
        &self,
        src: &CudaMatrix,
        src_row: usize,
        rows: usize,
        dst: &mut CudaMatrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("copy_rows")?;
        self.run_copy_rows(src, src_row, rows, dst, dst_row)
    }

    fn stack_columns(
        &self,
        src: &CudaMatrix,
        src_at: (usize, usize),
        rows: usize,
        groups: usize,
        dst: &mut CudaMatrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("stack_columns")?;
        self.run_stack_columns(src, src_at, rows, groups, (dst, dst_row))
    }

    fn unstack_columns(
        &self,
        src: &CudaMatrix,
        src_row: usize,
        rows: usize,
        groups: usize,
        dst: &mut CudaMatrix,
        dst_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("unstack_columns")?;
        self.run_unstack_columns(src, src_row, rows, groups, (dst, dst_row))
    }

    fn quantized_kv(&self, shape: HeadShape, rows: usize) -> Result<CudaMatrix, BackendError> {
        self.run_quantized_kv(shape, rows)
    }

    fn quantize_kv(
        &self,
        shape: HeadShape,
        kv: KvRef<'_, CudaMatrix>,
        row: usize,
        rows: usize,
        out: &mut CudaMatrix,
        out_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("quantize_kv")?;
        self.run_quantize_kv(shape, kv, row, rows, (out, out_row))
    }

    fn restore_kv(
        &self,
        shape: HeadShape,
        from: &CudaMatrix,
        row: usize,
        rows: usize,
        kv: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        self.mark("restore_kv")?;
        self.run_restore_kv(shape, from, row, rows, kv)
    }

    fn logits(
        &self,
        rows: usize,
        x: &CudaMatrix,
        head: &Head<'_, CudaWeight>,
        part: Range<usize>,
        out: &mut CudaScores,
        first_row: usize,
    ) -> Result<(), BackendError> {
        self.mark("logits")?;
        self.run_logits(rows, x, head, part, (out, first_row))
    }

    fn join_columns(
        &self,
        rows: usize,
        count: usize,
        parts: &CudaScores,
        out: &mut CudaScores,
    ) -> Result<(), BackendError> {
        self.mark("join_columns")?;
        self.run_join_columns(rows, count, parts, out)
    }

    fn next_tokens(&self, logits: &CudaScores, wanted: &[Wanted]) -> Result<Vec<Next>, BackendError> {
        self.mark("next_tokens")?;
        self.run_next_tokens(logits, wanted)
    }

    fn pace(&self) -> Result<(), BackendError> {
        self.keep_pace()
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        self.stream.synchronize("synchronize")
    }
}
