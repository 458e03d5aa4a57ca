//! Attention: a call's tasks by the kernels that take them, and their launches.
//!
//! On Hopper, tasks of many queries go to the warpgroup kernel; elsewhere, and for other head sizes, to the mma.sync one. Few queries over many keys
//! split the keys between blocks and combine the partial results.
//! Invariant: kernels are launched on checked shapes only; how a decode's keys are split follows from that task alone, so that its result does not hang on
//! what else is in the call.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use super::arena::{Arena, Piece};
use super::attention_kernels::{AttentionPath, Family, Kernel, Kernels, check_head_dim};
use super::attention_plan::{Splitting, Tiling, WorkList};
use super::driver::{Function, Stream, TensorMap, parameters};
use super::kept::restored;
use super::matrix::{CudaMatrix, CudaScores, Fp8Scales, require};
use super::modules::Modules;
use crate::{AttentionTask, BackendError, HeadShape, KvRef};

pub(super) const OP: &str = "attention";
/// As in kernels/attention/hopper.cu.
const MAX_MAPS: usize = 96;
/// As in kernels/attention/sources.h.
const MAX_SOURCES: usize = 64;
/// Work lists that are kept: one layer's are the next one's.
const KEPT_LISTS: usize = 8;

/// Attention on a device.
pub(super) struct Attention {
    kernels: Kernels,
    restore_fp8: Function,
    combine: Function,
    multiprocessors: usize,
    lists: Mutex<Vec<(ListKey, Arc<DeviceList>)>>,
}

struct ListKey {
    tasks: Vec<AttentionTask>,
    tiling: Tiling,
}

impl ListKey {
    fn is_of(&self, tasks: &[&AttentionTask], tiling: &Tiling) -> bool {
        self.tiling == *tiling && self.tasks.len() == tasks.len() && self.tasks.iter().eq(tasks.iter().copied())
    }
}

/// A work list in device memory, and what of it the host needs.
struct DeviceList {
    piece: Piece,
    segments_at: u64,
    works_at: u64,
    merges_at: u64,
    works: usize,
    merges: usize,
    slots: usize,
    maps: Vec<(usize, usize, usize)>,
    /// Packed rows of a row tile that has any to combine, at most.
    merged_rows: usize,
}

/// `Shape` of plan.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct ShapeWords {
    heads: i32,
    kv_heads: i32,
    group: i32,
    q_stride: i32,
    kv_stride: i32,
    out_stride: i32,
    scale: f32,
}

/// `Sources` of sources.h.
#[repr(C)]
struct SourceAddresses {
    k: [u64; MAX_SOURCES],
    v: [u64; MAX_SOURCES],
}

/// `Fp8Sources` of sources.h.
#[repr(C)]
struct Fp8SourceAddresses {
    k: [u64; MAX_SOURCES],
    v: [u64; MAX_SOURCES],
    k_scales: [u64; MAX_SOURCES],
    v_scales: [u64; MAX_SOURCES],
    rows: [i32; MAX_SOURCES],
}

/// `Maps` of hopper.cu.
#[repr(C)]
struct Maps {
    q: TensorMap,
    k: [TensorMap; MAX_MAPS],
    v: [TensorMap; MAX_MAPS],
}

/// `Output` of output.cuh.
#[repr(C)]
struct OutputAddresses {
    out: u64,
    lse: u64,
    partial: u64,
    partial_lse: u64,
}

/// The matrices of one call.
pub(super) struct Call<'a> {
    pub shape: HeadShape,
    pub q: &'a CudaMatrix,
    pub sources: &'a [KvRef<'a, CudaMatrix>],
    pub out: &'a CudaMatrix,
    pub lse: Option<&'a CudaScores>,
}

impl Attention {
    /// Looks the kernels up.
    pub fn new(modules: &Modules, multiprocessors: usize, path: AttentionPath) -> Result<Self, BackendError> {
        Ok(Self {
            kernels: Kernels::new(modules, path)?,
            restore_fp8: modules.function("kv_fp8", "restore_fp8", 0)?,
            combine: modules.function("attention/combine", "attention_combine", 0)?,
            multiprocessors,
            lists: Mutex::default(),
        })
    }

    /// Issues the attention of all tasks.
    pub fn run(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        tasks: &[AttentionTask],
    ) -> Result<(), BackendError> {
        check(call, tasks)?;
        if call.is_fp8() {
            return self.run_fp8(stream, arena, call, tasks);
        }
        for family in [Family::Hopper, Family::Mma, Family::Chunk, Family::Decode] {
            let belongs =
                |task: &&AttentionTask| !task.queries.is_empty() && self.kernels.family(call.shape, task) == family;
            self.launch_all(stream, arena, call, family, tasks.iter().filter(belongs).collect())?;
        }
        Ok(())
    }

    /// Issues tasks of a family: in one launch, unless they have more key/value ranges than there are tensor maps.
    fn launch_all(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        family: Family,
        tasks: Vec<&AttentionTask>,
    ) -> Result<(), BackendError> {
        match family {
            _ if tasks.is_empty() => Ok(()),
            Family::Hopper => {
                batches(tasks).iter().try_for_each(|batch| self.launch(stream, arena, call, family, batch))
            }
            _ => self.launch(stream, arena, call, family, &tasks),
        }
    }

    /// Over keys and values in FP8: decode reads them as they are, everything else has them restored.
    fn run_fp8(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        tasks: &[AttentionTask],
    ) -> Result<(), BackendError> {
        let asked = tasks.iter().filter(|task| !task.queries.is_empty());
        let (decoding, others): (Vec<_>, Vec<_>) = asked.partition(|task| self.kernels.reads_fp8(call.shape, task));
        self.launch_all(stream, arena, call, Family::DecodeFp8, decoding)?;
        if others.is_empty() {
            return Ok(());
        }
        let others: Vec<AttentionTask> = others.into_iter().cloned().collect();
        let segments = || others.iter().flat_map(|task| &task.segments);
        let restore = |(index, source): (usize, &KvRef<'_, CudaMatrix>)| {
            let rows = segments().filter(|segment| segment.source == index).map(|segment| segment.rows.end);
            let rows = rows.max().unwrap_or(0);
            let plain = |matrix| restored((stream, &self.restore_fp8), arena, call.shape, matrix, rows);
            Ok((plain(source.k)?, plain(source.v)?))
        };
        let plain: Vec<(CudaMatrix, CudaMatrix)> =
            call.sources.iter().enumerate().map(restore).collect::<Result<_, BackendError>>()?;
        let sources: Vec<_> = plain.iter().map(|(k, v)| KvRef { k, v }).collect();
        self.run(stream, arena, &Call { sources: &sources, ..*call }, &others)
    }

    /// Bytes that the partial results of a call take at most.
    pub fn most_partial_bytes(&self, head_dim: usize) -> usize {
        self.kernels.most_partial_bytes(head_dim, self.multiprocessors)
    }

    fn launch(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        family: Family,
        tasks: &[&AttentionTask],
    ) -> Result<(), BackendError> {
        let kernel = self.kernels.get(family, call.shape.head_dim)?;
        let tiling = self.tiling(kernel, family, call.shape);
        let list = self.list(stream, arena, tasks, &tiling)?;
        if family == Family::Hopper {
            return self.launch_hopper(stream, arena, call, kernel, &list);
        }
        let partial_rows = list.slots * call.shape.kv_heads * kernel.rows;
        let partial = arena.take(OP, partial_rows * call.shape.head_dim * 4)?;
        let partial_lse = arena.take(OP, partial_rows * 4)?;
        let (shape, plan) = (call.shape_words(), list.plan());
        let (sources, fp8_sources) = (call.addresses(), call.fp8_addresses());
        let sources: *mut std::ffi::c_void = match &fp8_sources {
            Some(fp8) => std::ptr::from_ref(&**fp8).cast_mut().cast(),
            None => std::ptr::from_ref(&sources).cast_mut().cast(),
        };
        let output =
            OutputAddresses { partial: partial.address(), partial_lse: partial_lse.address(), ..call.output() };
        let q = call.q.row(0);
        let grid = (list.works, call.shape.kv_heads, 1);
        let function = kernel.spread(list.works * call.shape.kv_heads, self.multiprocessors);
        // SAFETY: (1) parameters as in mma.cu and decode.cu; (2) pieces stay allocated in stream order, matrices are borrowed.
        unsafe {
            let parameters = parameters![shape, (), plan, q, output];
            parameters[1] = sources;
            stream.launch(&function, grid, kernel.threads, parameters)
        }?;
        let (merges, rows, head_dim) = (list.merges_at, kernel.rows as i32, call.shape.head_dim as i32);
        let grid = (list.merges, call.shape.kv_heads, list.merged_rows);
        let threads = (call.shape.head_dim / 2).next_multiple_of(32);
        // SAFETY: (1) parameters as in combine.cu; (2) as above.
        unsafe { stream.launch(&self.combine, grid, threads, parameters![shape, plan, merges, rows, head_dim, output]) }
    }

    fn launch_hopper(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        kernel: &Kernel,
        list: &DeviceList,
    ) -> Result<(), BackendError> {
        let maps = call.maps(kernel, &list.maps)?;
        let counter = arena.take(OP, 4)?;
        // SAFETY: (1) the counter has 4 bytes.
        unsafe { stream.fill(OP, counter.address(), 0, 4) }?;
        let pieces = list.works * call.shape.heads;
        let (shape, plan, output, counter) = (call.shape_words(), list.plan(), call.output(), counter.address());
        let (grid, pieces) = ((pieces.min(self.multiprocessors), 1, 1), pieces as i32);
        // SAFETY: (1) parameters as in hopper.cu; (2) pieces stay allocated in stream order, matrices are borrowed.
        unsafe {
            stream.launch(
                &kernel.function,
                grid,
                kernel.threads,
                parameters![*maps, shape, plan, pieces, counter, output],
            )
        }
    }

    fn tiling(&self, kernel: &Kernel, family: Family, shape: HeadShape) -> Tiling {
        let blocks = self.multiprocessors * kernel.resident / shape.kv_heads;
        let (group, splitting) = match family {
            Family::Hopper => (1, Splitting::Never),
            Family::Mma | Family::Chunk => (shape.group(), Splitting::Together(blocks)),
            Family::Decode | Family::DecodeFp8 => (shape.group(), Splitting::Alone(blocks)),
        };
        Tiling { rows: kernel.rows, keys: kernel.keys, group, splitting, least_tiles: kernel.least_tiles }
    }

    /// The work list of these tasks, from an earlier call if it was the same.
    fn list(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        tasks: &[&AttentionTask],
        tiling: &Tiling,
    ) -> Result<Arc<DeviceList>, BackendError> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = lists.iter().position(|(key, _)| key.is_of(tasks, tiling)) {
            let found = lists.remove(at);
            let list = found.1.clone();
            lists.push(found);
            return Ok(list);
        }
        let list = Arc::new(DeviceList::upload(stream, arena, &WorkList::new(tasks.iter().copied(), tiling))?);
        if lists.len() == KEPT_LISTS {
            lists.remove(0);
        }
        lists
            .push((ListKey { tasks: tasks.iter().map(|&task| task.clone()).collect(), tiling: *tiling }, list.clone()));
        Ok(list)
    }
}

/// Tasks that fit into one launch of Hopper's kernel: distinct key/value ranges are as many as there are tensor maps at most.
fn batches(tasks: Vec<&AttentionTask>) -> Vec<Vec<&AttentionTask>> {
    let mut batches: Vec<Vec<&AttentionTask>> = Vec::new();
    let mut ranges = std::collections::HashSet::new();
    for task in tasks {
        let own = || task.segments.iter().map(|segment| (segment.source, segment.rows.clone()));
        let added = own().filter(|range| !ranges.contains(range)).count();
        if batches.is_empty() || ranges.len() + added > MAX_MAPS {
            batches.push(Vec::new());
            ranges.clear();
        }
        ranges.extend(own());
        batches.last_mut().expect("one was just pushed if there was none").push(task);
    }
    batches
}

fn check(call: &Call<'_>, tasks: &[AttentionTask]) -> Result<(), BackendError> {
    let HeadShape { heads, kv_heads, head_dim } = call.shape;
    let even = kv_heads > 0 && heads > 0 && heads % kv_heads == 0;
    require(OP, even, "heads a multiple of KV heads, neither empty", format!("{:?}", call.shape))?;
    check_head_dim(head_dim)?;
    let queries = tasks.iter().map(|task| task.queries.end).max().unwrap_or(0);
    let wide_enough = call.q.rows >= queries && call.q.cols >= call.shape.q_width() && call.q.cols.is_multiple_of(8);
    let q_got = format!("[{}, {}]", call.q.rows, call.q.cols);
    require(OP, wide_enough, &format!("q [at least {queries}, at least {}]", call.shape.q_width()), q_got)?;
    call.out.need(OP, "out", queries, call.shape.q_width())?;
    if let Some(lse) = call.lse {
        super::matrix::need(OP, "lse", (queries, heads), (lse.rows, lse.cols))?;
    }
    require(OP, call.sources.len() <= MAX_SOURCES, &format!("at most {MAX_SOURCES} sources"), call.sources.len())?;
    for segment in tasks.iter().flat_map(|task| &task.segments) {
        require(
            OP,
            segment.source < call.sources.len(),
            &format!("a source below {}", call.sources.len()),
            segment.source,
        )?;
        let source = &call.sources[segment.source];
        source.k.need_either(OP, "keys", segment.rows.end, call.shape.kv_width())?;
        source.v.need_either(OP, "values", segment.rows.end, call.shape.kv_width())?;
    }
    let in_fp8 = call.sources.iter().flat_map(|source| [source.k, source.v]).filter(|matrix| matrix.fp8.is_some());
    let in_fp8 = in_fp8.count();
    require(OP, in_fp8 == 0 || in_fp8 == 2 * call.sources.len(), "sources all in bf16 or all in FP8", in_fp8)?;
    let segments = tasks.iter().map(|task| task.segments.len()).max().unwrap_or(0);
    require(OP, segments <= MAX_MAPS, &format!("at most {MAX_MAPS} segments a task"), segments)
}

impl Call<'_> {
    fn shape_words(&self) -> ShapeWords {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let [heads, kv_heads, group, q_stride, kv_stride, out_stride] =
            [heads, kv_heads, self.shape.group(), self.q.cols, self.shape.kv_width(), self.out.cols].map(|n| n as i32);
        ShapeWords { heads, kv_heads, group, q_stride, kv_stride, out_stride, scale: 1.0 / (head_dim as f32).sqrt() }
    }

    fn addresses(&self) -> SourceAddresses {
        let mut addresses = SourceAddresses { k: [0; MAX_SOURCES], v: [0; MAX_SOURCES] };
        for (i, source) in self.sources.iter().enumerate() {
            addresses.k[i] = source.k.piece.address();
            addresses.v[i] = source.v.piece.address();
        }
        addresses
    }

    fn is_fp8(&self) -> bool {
        self.sources.iter().any(|source| source.k.fp8.is_some())
    }

    fn fp8_addresses(&self) -> Option<Box<Fp8SourceAddresses>> {
        if !self.is_fp8() {
            return None;
        }
        let none = [0; MAX_SOURCES];
        let mut addresses =
            Fp8SourceAddresses { k: none, v: none, k_scales: none, v_scales: none, rows: [0; MAX_SOURCES] };
        for (i, KvRef { k, v }) in self.sources.iter().enumerate() {
            (addresses.k[i], addresses.v[i]) = (k.piece.address(), v.piece.address());
            (addresses.k_scales[i], addresses.v_scales[i]) = (Fp8Scales::address_of(k), Fp8Scales::address_of(v));
            addresses.rows[i] = k.rows as i32;
        }
        Some(Box::new(addresses))
    }

    fn output(&self) -> OutputAddresses {
        let lse = self.lse.map_or(0, |lse| lse.row(0));
        OutputAddresses { out: self.out.row(0), lse, partial: 0, partial_lse: 0 }
    }

    fn maps(&self, kernel: &Kernel, ranges: &[(usize, usize, usize)]) -> Result<Box<Maps>, BackendError> {
        let blocks = self.shape.head_dim / 64;
        let mut maps =
            Box::new(Maps { q: TensorMap::UNUSED, k: [TensorMap::UNUSED; MAX_MAPS], v: [TensorMap::UNUSED; MAX_MAPS] });
        maps.q = TensorMap::new(
            self.q.row(0),
            self.q.rows,
            self.shape.heads * blocks,
            self.q.cols * 2,
            kernel.rows,
            blocks,
        )?;
        for (i, &(source, first, rows)) in ranges.iter().enumerate() {
            let map = |matrix: &CudaMatrix| {
                TensorMap::new(
                    matrix.row(first),
                    rows,
                    self.shape.kv_heads * blocks,
                    matrix.cols * 2,
                    kernel.keys,
                    blocks,
                )
            };
            maps.k[i] = map(self.sources[source].k)?;
            maps.v[i] = map(self.sources[source].v)?;
        }
        Ok(maps)
    }
}

impl DeviceList {
    fn upload(stream: &Stream, arena: &Arc<Arena>, list: &WorkList) -> Result<Self, BackendError> {
        let mut bytes = Vec::new();
        let mut append = |part: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let at = bytes.len() as u64;
            bytes.extend_from_slice(part);
            at
        };
        append(bytemuck::cast_slice(&list.tasks));
        let segments_at = append(bytemuck::cast_slice(&list.segments));
        let works_at = append(bytemuck::cast_slice(&list.works));
        let merges_at = append(bytemuck::cast_slice(&list.merges));
        let piece = arena.take(OP, bytes.len())?;
        // SAFETY: (1) the piece has room for the bytes.
        unsafe { stream.upload(OP, &bytes, piece.address()) }?;
        let base = piece.address();
        Ok(Self {
            segments_at: base + segments_at,
            works_at: base + works_at,
            merges_at: base + merges_at,
            works: list.works.len(),
            merges: list.merges.len(),
            slots: list.slots,
            maps: list.maps.clone(),
            merged_rows: list.merged_rows,
            piece,
        })
    }

    /// `Plan` of plan.h.
    fn plan(&self) -> [u64; 3] {
        [self.piece.address(), self.segments_at, self.works_at]
    }
}
