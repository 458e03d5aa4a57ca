//! Attention: which kernel takes a task, and its launch.
//!
//! On Hopper, tasks of many queries go to the warpgroup kernel; elsewhere, and for other head sizes, to the mma.sync one. Few queries over many keys
//! split the keys between blocks and combine the partial results.
//! Invariant: kernels are launched on checked shapes only.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use super::arena::{Arena, Piece};
use super::attention_plan::{Tiling, WorkList};
use super::driver::{Function, Stream, TensorMap, parameters};
use super::kept::restored;
use super::matrix::{CudaMatrix, CudaScores, require};
use super::modules::Modules;
use crate::backend::{AttentionTask, BackendError, HeadShape, KvRef};

const OP: &str = "attention";
/// Sizes of a head there are kernels for.
const HEAD_DIMS: [usize; 4] = [16, 32, 64, 128];
/// As in kernels/attention/hopper.cu.
const MAX_MAPS: usize = 96;
/// As in kernels/attention/sources.h.
const MAX_SOURCES: usize = 64;
/// Queries from which on a task is worth Hopper's tiles of 128.
const HOPPER_QUERIES: usize = 128;
/// Packed rows (queries times heads of a group) of a decode row tile.
const DECODE_ROWS: usize = 16;
/// Packed rows up to which a task is a chunk of queries, with tiles of 64 rows.
const CHUNK_ROWS: usize = 512;
/// Work lists that are kept: one layer's are the next one's.
const KEPT_LISTS: usize = 8;

/// The families of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Family {
    Hopper,
    Mma,
    Chunk,
    Decode,
    DecodeFp8,
}

/// A kernel for a head size.
struct Kernel {
    function: Function,
    rows: usize,
    keys: usize,
    threads: usize,
    /// Blocks of it that a multiprocessor holds.
    resident: usize,
    /// Key tiles of a split piece at least.
    least_tiles: usize,
}

/// Which kernels a backend may use for tasks of many queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionPath {
    /// The fastest the device has.
    #[default]
    Fastest,
    /// The ones for every architecture.
    Portable,
}

/// The attention kernels of a device.
pub(super) struct Attention {
    hopper: Vec<(usize, Kernel)>,
    mma: Vec<(usize, Kernel)>,
    chunk: Vec<(usize, Kernel)>,
    decode: Vec<(usize, Kernel)>,
    decode_fp8: Vec<(usize, Kernel)>,
    restore_fp8: Function,
    combine: Function,
    multiprocessors: usize,
    lists: Mutex<Vec<(ListKey, Arc<DeviceList>)>>,
}

#[derive(PartialEq, Eq)]
struct ListKey {
    tasks: Vec<AttentionTask>,
    tiling: Tiling,
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
    k_factors: [u64; MAX_SOURCES],
    v_factors: [u64; MAX_SOURCES],
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
        let with_hopper = path == AttentionPath::Fastest && modules.has("attention/hopper");
        let family = |dims: &[usize], make: &dyn Fn(usize) -> Result<Kernel, BackendError>| {
            dims.iter().map(|&dim| Ok((dim, make(dim)?))).collect::<Result<Vec<_>, BackendError>>()
        };
        Ok(Self {
            hopper: family(if with_hopper { &HEAD_DIMS[2..] } else { &[] }, &|dim| hopper_kernel(modules, dim))?,
            mma: family(&HEAD_DIMS, &|dim| mma_kernel(modules, dim, Family::Mma))?,
            chunk: family(&HEAD_DIMS, &|dim| mma_kernel(modules, dim, Family::Chunk))?,
            decode: family(&HEAD_DIMS, &|dim| decode_kernel(modules, dim))?,
            decode_fp8: family(&HEAD_DIMS, &|dim| decode_fp8_kernel(modules, dim))?,
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
            let of_family =
                tasks.iter().filter(|task| !task.queries.is_empty() && self.family(call.shape, task) == family);
            for batch in batches(of_family) {
                self.launch(stream, arena, call, family, &batch)?;
            }
        }
        Ok(())
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
        let (decoding, others): (Vec<_>, Vec<_>) =
            asked.partition(|task| self.family(call.shape, task) == Family::Decode);
        for batch in batches(decoding.into_iter()) {
            self.launch(stream, arena, call, Family::DecodeFp8, &batch)?;
        }
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

    /// Bytes that the partial results of a call take at most: keys are split only as far as there are blocks to take the pieces.
    pub fn most_partial_bytes(&self, head_dim: usize) -> usize {
        let families = [&self.mma, &self.chunk, &self.decode, &self.decode_fp8];
        let kernels = families.into_iter().flatten().filter(|(dim, _)| *dim == head_dim);
        let bytes =
            kernels.map(|(_, kernel)| self.multiprocessors * kernel.resident * kernel.rows * (head_dim + 1) * 4);
        bytes.max().unwrap_or(0)
    }

    fn family(&self, shape: HeadShape, task: &AttentionTask) -> Family {
        let packed = task.queries.len() * shape.group();
        let has_hopper = self.hopper.iter().any(|(dim, _)| *dim == shape.head_dim);
        if has_hopper && task.queries.len() >= HOPPER_QUERIES {
            Family::Hopper
        } else if packed <= DECODE_ROWS {
            Family::Decode
        } else if packed <= CHUNK_ROWS {
            Family::Chunk
        } else {
            Family::Mma
        }
    }

    fn kernel(&self, family: Family, head_dim: usize) -> Result<&Kernel, BackendError> {
        let of_family = match family {
            Family::Hopper => &self.hopper,
            Family::Mma => &self.mma,
            Family::Chunk => &self.chunk,
            Family::Decode => &self.decode,
            Family::DecodeFp8 => &self.decode_fp8,
        };
        let found = of_family.iter().find(|(dim, _)| *dim == head_dim).map(|(_, kernel)| kernel);
        found.ok_or_else(|| BackendError::Shape {
            op: OP,
            expected: format!("head_dim of {HEAD_DIMS:?}"),
            got: head_dim.to_string(),
        })
    }

    fn launch(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        call: &Call<'_>,
        family: Family,
        tasks: &[AttentionTask],
    ) -> Result<(), BackendError> {
        let kernel = self.kernel(family, call.shape.head_dim)?;
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
        // SAFETY: (1) parameters as in mma.cu and decode.cu; (2) pieces stay allocated in stream order, matrices are borrowed.
        unsafe {
            let parameters = parameters![shape, (), plan, q, output];
            parameters[1] = sources;
            stream.launch(&kernel.function, grid, kernel.threads, parameters)
        }?;
        let (merges, rows, head_dim) = (list.merges_at, kernel.rows as i32, call.shape.head_dim as i32);
        let grid = (list.merges, call.shape.kv_heads, kernel.rows);
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
        let (group, wanted_pieces) = match family {
            Family::Hopper => (1, 0),
            _ => (shape.group(), self.multiprocessors * kernel.resident / shape.kv_heads),
        };
        Tiling { rows: kernel.rows, keys: kernel.keys, group, wanted_pieces, least_tiles: kernel.least_tiles }
    }

    /// The work list of these tasks, from an earlier call if it was the same.
    fn list(
        &self,
        stream: &Stream,
        arena: &Arc<Arena>,
        tasks: &[AttentionTask],
        tiling: &Tiling,
    ) -> Result<Arc<DeviceList>, BackendError> {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = lists.iter().position(|(key, _)| key.tiling == *tiling && key.tasks == tasks) {
            let found = lists.remove(at);
            let list = found.1.clone();
            lists.push(found);
            return Ok(list);
        }
        let list = Arc::new(DeviceList::upload(stream, arena, &WorkList::new(tasks, tiling))?);
        if lists.len() == KEPT_LISTS {
            lists.remove(0);
        }
        lists.push((ListKey { tasks: tasks.to_vec(), tiling: *tiling }, list.clone()));
        Ok(list)
    }
}

fn hopper_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let stages = 2;
    let (name, rows, keys) = match head_dim {
        128 => ("attention_hopper_128", 192, 80),
        _ => ("attention_hopper_64", 128, 128),
    };
    // Query tile, rings of keys and values, barriers.
    let shared = rows * head_dim * 2 + 2 * stages * keys * head_dim * 2 + 1024;
    let function = modules.function("attention/hopper", name, shared)?;
    // A warpgroup for every 64 rows, and the producer's.
    Ok(Kernel { function, rows, keys, threads: 128 * (rows / 64 + 1), resident: 1, least_tiles: 1 })
}

fn mma_kernel(modules: &Modules, head_dim: usize, family: Family) -> Result<Kernel, BackendError> {
    let (prefix, rows) = if family == Family::Mma { ("mma", 128) } else { ("chunk", 64) };
    let keys = 64;
    let name = match (prefix, head_dim) {
        ("mma", 128) => "attention_mma_128",
        ("mma", 64) => "attention_mma_64",
        ("mma", 32) => "attention_mma_32",
        ("mma", _) => "attention_mma_16",
        (_, 128) => "attention_chunk_128",
        (_, 64) => "attention_chunk_64",
        (_, 32) => "attention_chunk_32",
        _ => "attention_chunk_16",
    };
    let function = modules.function("attention/mma", name, (rows + 4 * keys) * head_dim * 2)?;
    Ok(Kernel { function, rows, keys, threads: 128, resident: 2, least_tiles: 4 })
}

fn decode_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let (warps, keys, stages) = (4, 32, 2);
    let name = match head_dim {
        128 => "attention_decode_128",
        64 => "attention_decode_64",
        32 => "attention_decode_32",
        _ => "attention_decode_16",
    };
    let shared = (DECODE_ROWS + warps * stages * 2 * keys) * head_dim * 2;
    let function = modules.function("attention/decode", name, shared)?;
    Ok(Kernel {
        function,
        rows: DECODE_ROWS,
        keys,
        threads: 32 * warps,
        resident: 128 / head_dim,
        least_tiles: 2 * warps,
    })
}

fn decode_fp8_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let (warps, keys, stages) = (4, 32, 2);
    let name = match head_dim {
        128 => "attention_decode_fp8_128",
        64 => "attention_decode_fp8_64",
        32 => "attention_decode_fp8_32",
        _ => "attention_decode_fp8_16",
    };
    // Codes and factors of keys and values in every stage, and a tile in bf16.
    let ring = stages * 2 * keys * (head_dim + 4) + keys * head_dim * 2;
    let function = modules.function("attention/decode", name, DECODE_ROWS * head_dim * 2 + warps * ring)?;
    Ok(Kernel {
        function,
        rows: DECODE_ROWS,
        keys,
        threads: 32 * warps,
        // Decoding takes its time: twice the warps of bf16 hide it.
        resident: 256 / head_dim,
        least_tiles: 2 * warps,
    })
}

/// Tasks that fit into one launch: distinct key/value ranges are as many as there are tensor maps at most, and so are sources.
fn batches<'a>(tasks: impl Iterator<Item = &'a AttentionTask>) -> Vec<Vec<AttentionTask>> {
    let mut batches: Vec<Vec<AttentionTask>> = Vec::new();
    let mut ranges = std::collections::HashSet::new();
    for task in tasks {
        let own = || task.segments.iter().map(|segment| (segment.source, segment.rows.clone()));
        let added = own().filter(|range| !ranges.contains(range)).count();
        if batches.is_empty() || ranges.len() + added > MAX_MAPS {
            batches.push(Vec::new());
            ranges.clear();
        }
        ranges.extend(own());
        batches.last_mut().expect("one was just pushed if there was none").push(task.clone());
    }
    batches
}

fn check(call: &Call<'_>, tasks: &[AttentionTask]) -> Result<(), BackendError> {
    let HeadShape { heads, kv_heads, head_dim } = call.shape;
    let even = kv_heads > 0 && heads > 0 && heads % kv_heads == 0;
    require(OP, even, "heads a multiple of KV heads, neither empty", format!("{:?}", call.shape))?;
    require(OP, HEAD_DIMS.contains(&head_dim), &format!("head_dim of {HEAD_DIMS:?}"), head_dim)?;
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
            Fp8SourceAddresses { k: none, v: none, k_factors: none, v_factors: none, rows: [0; MAX_SOURCES] };
        for (i, KvRef { k, v }) in self.sources.iter().enumerate() {
            let factors = |matrix: &CudaMatrix| matrix.fp8.as_ref().map_or(0, |factors| factors.piece.address());
            (addresses.k[i], addresses.v[i]) = (k.piece.address(), v.piece.address());
            (addresses.k_factors[i], addresses.v_factors[i]) = (factors(k), factors(v));
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
            piece,
        })
    }

    /// `Plan` of plan.h.
    fn plan(&self) -> [u64; 3] {
        [self.piece.address(), self.segments_at, self.works_at]
    }
}
