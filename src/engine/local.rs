//! The engine on this machine's processor: a model directory opened, ranks as threads that share the weights.
//!
//! Invariant: the threads of all ranks together are never more than were given, unless there are more ranks than threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use crate::backend::cpu::Cpu;
use crate::comm::local::LocalComm;
use crate::model::ModelSpec;
use crate::model::weights::Weights;

use super::EngineError;
use super::devices::{Devices, Memory};
use super::host_memory::available_bytes;
use super::open::OpenError;
use super::service::ModelEngine;

/// How long a rank waits for the others in a collective. One that fails is noticed at once; this is for one that is stuck, and
/// far longer than the layer of any context that a processor can be asked to read.
const PEER_DEADLINE: Duration = Duration::from_secs(60 * 60);

/// Rows that a thread of the backend works on at a time, at most.
const SCRATCH_ROWS: usize = 512;

/// Inferences at a time unless told otherwise: a processor is busy with one prefill, and gains a little by generating for a few at once.
const CONCURRENCY: usize = 4;

/// How to open a model on this machine.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Retaining heads; absent: those in the model's directory, if any.
    pub heads: Option<PathBuf>,
    /// Ranks at most.
    pub ranks: usize,
    /// Threads of all ranks together.
    pub threads: usize,
    /// Inferences at a time.
    pub concurrency: usize,
    /// Memory for an inference beyond the weights, in bytes; absent: what the system has available at the time.
    pub memory_bytes: Option<u64>,
}

impl Default for LocalOptions {
    fn default() -> Self {
        let threads = available_parallelism().map_or(1, usize::from);
        Self { heads: None, ranks: 1, threads, concurrency: CONCURRENCY, memory_bytes: None }
    }
}

/// The processor, with the weights in this process's memory.
pub struct CpuDevices {
    weights: Weights<Cpu>,
    ranks: usize,
    threads: usize,
    concurrency: usize,
    memory_bytes: Option<u64>,
}

/// An engine on this machine's processor.
pub type LocalEngine = ModelEngine<CpuDevices>;

impl ModelEngine<CpuDevices> {
    /// Opens a model directory: `config.json` and weights, a tokenizer if there is one, retaining heads if there are any.
    pub fn open(directory: &Path, options: &LocalOptions) -> Result<Self, OpenError> {
        Self::open_on(directory, options.heads.as_deref(), |files| {
            let loader = Cpu::new(options.threads.max(1))?;
            Ok(CpuDevices {
                weights: Weights::load(&loader, files.directory, &files.spec, files.heads.as_deref())?,
                ranks: options.ranks.max(1),
                threads: options.threads.max(1),
                concurrency: options.concurrency.max(1),
                memory_bytes: options.memory_bytes,
            })
        })
    }
}

impl Devices for CpuDevices {
    type Backend = Cpu;
    type Comm = LocalComm;

    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    fn element_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn scratch_bytes(&self, spec: &ModelSpec) -> u64 {
        // Gate, up and their product of a chunk, and the like for attention; the backend's chunks are shorter.
        let row = 3 * spec.intermediate + spec.hidden + spec.shape.qkv_width();
        (self.threads * SCRATCH_ROWS * row * size_of::<f32>()) as u64
    }

    fn memory(&self) -> Memory {
        Memory::Shared(self.memory_bytes.unwrap_or_else(available_bytes))
    }

    fn connect(&self, active: usize) -> Result<Vec<(Arc<Cpu>, LocalComm)>, EngineError> {
        let threads = |rank| (self.threads / active + usize::from(rank < self.threads % active)).max(1);
        let member = |(rank, comm)| match Cpu::new(threads(rank)) {
            Ok(backend) => Ok((Arc::new(backend), comm)),
            Err(error) => Err(EngineError::Device { reason: error.to_string() }),
        };
        LocalComm::group(active, PEER_DEADLINE).into_iter().enumerate().map(member).collect()
    }

    fn weights(&self, _rank: usize) -> &Weights<Cpu> {
        &self.weights
    }
}
