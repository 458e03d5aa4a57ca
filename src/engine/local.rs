//! The engine on this machine's processor: a model directory opened, ranks as threads that share the weights.
//!
//! Invariant: the threads of all ranks together are never more than were given, unless there are more ranks than threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use crate::backend::cpu::Cpu;
use crate::comm::hub::Place;
use crate::comm::local::LocalComm;
use crate::model::ModelSpec;
use crate::model::weights::Weights;

use super::EngineError;
use super::devices::{Connected, Devices, Memory};
use super::host_memory::available_bytes;
use super::open::OpenError;
use super::service::ModelEngine;

/// How long a rank waits for the others in a collective while none of them comes further. One that fails is noticed at once; this is for one that is
/// stuck, and far longer than the layer of any context that a processor can be asked to read.
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
    /// Ranks at most; with several nodes those of each.
    pub ranks: usize,
    /// Threads of all ranks together.
    pub threads: usize,
    /// Inferences at a time.
    pub concurrency: usize,
    /// Memory for an inference beyond the weights, in bytes; absent: what the system has available at the time.
    pub memory_bytes: Option<u64>,
    /// This node's place among several.
    pub place: Option<Place>,
}

impl Default for LocalOptions {
    fn default() -> Self {
        let threads = available_parallelism().map_or(1, usize::from);
        Self { heads: None, ranks: 1, threads, concurrency: CONCURRENCY, memory_bytes: None, place: None }
    }
}

/// The processor, with the weights in this process's memory.
pub struct CpuDevices {
    weights: Weights<Cpu>,
    ranks: usize,
    threads: usize,
    concurrency: usize,
    memory_bytes: Option<u64>,
    place: Option<Place>,
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
                place: options.place.clone(),
            })
        })
    }
}

impl Devices for CpuDevices {
    type Backend = Cpu;
    type Comm = LocalComm;

    fn name(&self) -> String {
        match &self.place {
            Some(place) => format!("cpu on {} nodes", place.nodes),
            None => "cpu".to_owned(),
        }
    }

    fn ranks(&self) -> usize {
        self.ranks * self.place.as_ref().map_or(1, |place| place.nodes)
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
        let available = self.memory_bytes.unwrap_or_else(available_bytes);
        match self.place {
            // Other nodes have their own, and are taken to be like this one.
            Some(_) => Memory::Each(available / self.ranks as u64),
            None => Memory::Shared(available),
        }
    }

    fn are_joined_once(&self) -> bool {
        self.place.is_some()
    }

    fn connect(&self) -> Result<Connected<Self>, EngineError> {
        let failed = |reason: String| EngineError::Device { reason };
        let (ends, side) = match &self.place {
            Some(place) => {
                let (ends, side) =
                    LocalComm::group_at(place, self.ranks, PEER_DEADLINE).map_err(|error| failed(error.to_string()))?;
                (ends, Some(side))
            }
            None => (LocalComm::group(self.ranks, PEER_DEADLINE), None),
        };
        let threads = |index| (self.threads / self.ranks + usize::from(index < self.threads % self.ranks)).max(1);
        let member = |(index, comm)| match Cpu::new(threads(index)) {
            Ok(backend) => Ok((Arc::new(backend), comm)),
            Err(error) => Err(failed(error.to_string())),
        };
        Ok(Connected { members: ends.into_iter().enumerate().map(member).collect::<Result<_, _>>()?, side })
    }

    fn weights(&self, _index: usize) -> &Weights<Cpu> {
        &self.weights
    }
}
