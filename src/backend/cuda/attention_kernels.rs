//! The attention kernels of a device, and which of them takes a task.
//!
//! Invariant: sizes here are those of the kernels' sources; a task is taken by the same kernel whatever else is in the call.

use super::attention::OP;
use super::driver::Function;
use super::matrix::require;
use super::modules::Modules;
use crate::{AttentionTask, BackendError, HeadShape};

/// Sizes of a head there are kernels for.
pub(super) const HEAD_DIMS: [usize; 4] = [16, 32, 64, 128];
/// Those of a head in FP8; other heads are restored first.
const FP8_HEAD_DIMS: [usize; 2] = [64, 128];
/// Queries from which on a task is worth Hopper's tiles of 128.
const HOPPER_QUERIES: usize = 128;
/// Packed rows (queries times heads of a group) of a decode row tile.
const DECODE_ROWS: usize = 16;
/// Packed rows up to which a task is a chunk of queries, with tiles of 64 rows.
const CHUNK_ROWS: usize = 512;
/// Tasks of a batch of decodes at most, for what is taken into account before it runs.
const USUAL_DECODES: usize = 64;

/// The families of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    Hopper,
    Mma,
    Chunk,
    Decode,
    DecodeFp8,
}

/// A kernel for a head size.
pub(super) struct Kernel {
    pub function: Function,
    pub rows: usize,
    pub keys: usize,
    pub threads: usize,
    /// Blocks of it that a multiprocessor holds.
    pub resident: usize,
    /// Key tiles of a split piece at least.
    pub least_tiles: usize,
    /// Shared memory of a multiprocessor, bytes, where blocks are to be spread evenly.
    spread_over: Option<usize>,
}

impl Kernel {
    /// The kernel for a launch of `blocks`. Those of less than a wave begin while the kernel before still holds some multiprocessors, and would be put
    /// two to one where there is room, with none left for the others: each takes as much shared memory as leaves room for an even share only.
    pub fn spread(&self, blocks: usize, multiprocessors: usize) -> Function {
        let each = blocks.div_ceil(multiprocessors).max(1);
        match self.spread_over {
            Some(bytes) if each <= self.resident => self.function.with_shared(bytes / (each + 1)),
            _ => self.function,
        }
    }
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

/// Kernels of a family by the size of a head.
type OfFamily = Vec<(usize, Kernel)>;

/// All of them.
pub(super) struct Kernels {
    hopper: OfFamily,
    mma: OfFamily,
    chunk: OfFamily,
    decode: OfFamily,
    decode_fp8: OfFamily,
}

impl Kernels {
    /// Looks them up.
    pub fn new(modules: &Modules, path: AttentionPath) -> Result<Self, BackendError> {
        let with_hopper = path == AttentionPath::Fastest && modules.has("attention/hopper");
        let family = |dims: &[usize], make: &dyn Fn(usize) -> Result<Kernel, BackendError>| {
            dims.iter().map(|&dim| Ok((dim, make(dim)?))).collect::<Result<OfFamily, BackendError>>()
        };
        Ok(Self {
            hopper: family(if with_hopper { &HEAD_DIMS[2..] } else { &[] }, &|dim| hopper_kernel(modules, dim))?,
            mma: family(&HEAD_DIMS, &|dim| mma_kernel(modules, dim, Family::Mma))?,
            chunk: family(&HEAD_DIMS, &|dim| mma_kernel(modules, dim, Family::Chunk))?,
            decode: family(&HEAD_DIMS, &|dim| decode_kernel(modules, dim))?,
            decode_fp8: family(&FP8_HEAD_DIMS, &|dim| decode_fp8_kernel(modules, dim))?,
        })
    }

    /// Bytes that the partial results of a call take at most: keys are split only as far as there are blocks to take the pieces, those of decodes as far
    /// as if each were alone.
    pub fn most_partial_bytes(&self, head_dim: usize, multiprocessors: usize) -> usize {
        let together = [(&self.mma, 1), (&self.chunk, 1)];
        let apart = [(&self.decode, USUAL_DECODES), (&self.decode_fp8, USUAL_DECODES)];
        let kernels = together.into_iter().chain(apart).flat_map(|(of, tasks)| of.iter().map(move |of| (of, tasks)));
        let bytes = kernels.filter(|((dim, _), _)| *dim == head_dim).map(|((_, kernel), tasks)| {
            tasks * multiprocessors * kernel.resident * kernel.rows * (head_dim + 1) * size_of::<f32>()
        });
        bytes.max().unwrap_or(0)
    }

    /// Whose task this is, over keys and values in bf16.
    pub fn family(&self, shape: HeadShape, task: &AttentionTask) -> Family {
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

    /// Whether the task reads keys and values in FP8 as they are.
    pub fn reads_fp8(&self, shape: HeadShape, task: &AttentionTask) -> bool {
        self.family(shape, task) == Family::Decode && FP8_HEAD_DIMS.contains(&shape.head_dim)
    }

    /// The kernel of a family for a size of a head.
    pub fn get(&self, family: Family, head_dim: usize) -> Result<&Kernel, BackendError> {
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
}

/// A size of a head there are kernels for.
pub(super) fn check_head_dim(head_dim: usize) -> Result<(), BackendError> {
    require(OP, HEAD_DIMS.contains(&head_dim), &format!("head_dim of {HEAD_DIMS:?}"), head_dim)
}

fn hopper_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let (rows, stages) = (192, 2);
    let (name, keys) = match head_dim {
        128 => ("attention_hopper_128", 80),
        _ => ("attention_hopper_64", 128),
    };
    // Query tile, rings of keys and values, barriers.
    let shared = rows * head_dim * 2 + 2 * stages * keys * head_dim * 2 + 1024;
    let function = modules.function("attention/hopper", name, shared)?;
    // A warpgroup for every 64 rows, and the producer's.
    Ok(Kernel { function, rows, keys, threads: 128 * (rows / 64 + 1), resident: 1, least_tiles: 1, spread_over: None })
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
    Ok(Kernel { function, rows, keys, threads: 128, resident: 2, least_tiles: 4, spread_over: None })
}

fn decode_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let (warps, keys, stages) = (4, 16, 3);
    let name = match head_dim {
        128 => "attention_decode_128",
        64 => "attention_decode_64",
        32 => "attention_decode_32",
        _ => "attention_decode_16",
    };
    let shared = (DECODE_ROWS + warps * stages * 2 * keys) * head_dim * 2;
    let function = modules.function_up_to("attention/decode", name, shared, modules.shared_bytes / 2)?;
    Ok(Kernel {
        function,
        rows: DECODE_ROWS,
        keys,
        threads: 32 * warps,
        resident: 128 / head_dim,
        least_tiles: 4 * warps,
        spread_over: Some(modules.shared_bytes),
    })
}

fn decode_fp8_kernel(modules: &Modules, head_dim: usize) -> Result<Kernel, BackendError> {
    let (warps, keys, stages) = (4, 32, 3);
    let name = if head_dim == 128 { "attention_decode_fp8_128" } else { "attention_decode_fp8_64" };
    // Codes and scales of keys and values in every stage of every warp.
    let shared = warps * stages * 2 * (keys * head_dim + keys + 16);
    let function = modules.function_up_to("attention/decode_fp8", name, shared, modules.shared_bytes / 2)?;
    Ok(Kernel {
        function,
        rows: DECODE_ROWS,
        keys,
        threads: 32 * warps,
        resident: 256 / head_dim,
        least_tiles: 2 * warps,
        spread_over: Some(modules.shared_bytes),
    })
}
