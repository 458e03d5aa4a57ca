//! The engine on a GPU: weights and everything else in one device's memory, one rank.
//!
//! Invariant: what an inference needs is known to fit before it starts; a device that failed is never used again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::HeadShape;
use crate::backend::cuda::{Cuda, CudaOptions, ScratchShape};
use crate::comm::solo::SoloComm;
use crate::model::ModelSpec;
use crate::model::weights::Weights;

use super::EngineError;
use super::devices::{Devices, Memory};
use super::open::OpenError;
use super::service::ModelEngine;

/// Left free for what is small and not counted: work lists, positions, token ids, keys of the selection.
const UNCOUNTED_BYTES: u64 = 128 << 20;

/// Sequences at a time: as many keys and values as one launch of attention reads from, less some for the context that prefills.
const CONCURRENCY: usize = 48;

/// How to open a model on a GPU.
#[derive(Debug, Clone, Default)]
pub struct CudaEngineOptions {
    /// Retaining heads; absent: those in the model's directory, if any.
    pub heads: Option<PathBuf>,
    /// Number of the device.
    pub device: usize,
    /// Memory and kernels.
    pub backend: CudaOptions,
}

/// One GPU with a model's weights on it.
pub struct CudaDevices {
    // Before the device, whose memory they are in.
    weights: Weights<Cuda>,
    backend: Arc<Cuda>,
}

/// An engine on a GPU.
pub type CudaEngine = ModelEngine<CudaDevices>;

impl ModelEngine<CudaDevices> {
    /// Opens a model directory: `config.json` and weights, a tokenizer if there is one, retaining heads if there are any.
    pub fn open(directory: &Path, options: &CudaEngineOptions) -> Result<Self, OpenError> {
        Self::open_on(directory, options.heads.as_deref(), |files| {
            let backend = Cuda::open(options.device, &options.backend)?;
            let weights = Weights::load(&backend, files.directory, &files.spec, files.heads.as_deref())?;
            Ok(CudaDevices::new(backend, weights))
        })
    }
}

impl CudaDevices {
    /// A device and the weights on it.
    pub fn new(backend: Cuda, weights: Weights<Cuda>) -> Self {
        Self { weights, backend: Arc::new(backend) }
    }

    /// The device.
    pub fn backend(&self) -> &Cuda {
        &self.backend
    }
}

impl Devices for CudaDevices {
    type Backend = Cuda;
    type Comm = SoloComm;

    fn name(&self) -> String {
        format!("cuda ({})", self.backend.device_name())
    }

    fn ranks(&self) -> usize {
        1
    }

    fn concurrency(&self) -> usize {
        CONCURRENCY
    }

    fn element_bytes(&self) -> usize {
        size_of::<half::bf16>()
    }

    fn kept_row_bytes(&self, shape: HeadShape) -> usize {
        self.backend.kv_cache().bytes(2 * shape.kv_width(), shape.head_dim)
    }

    fn scratch_bytes(&self, spec: &ModelSpec) -> u64 {
        let head_width =
            self.weights.retaining_heads.as_ref().and_then(|heads| heads.first()).map_or(0, |head| head.w2.cols());
        let shape = ScratchShape { heads: spec.shape, intermediate: spec.intermediate, vocab: spec.vocab, head_width };
        self.backend.scratch_bytes(&shape)
    }

    fn memory(&self) -> Memory {
        Memory::Each((self.backend.free_bytes() as u64).saturating_sub(UNCOUNTED_BYTES))
    }

    fn connect(&self, active: usize) -> Result<Vec<(Arc<Cuda>, SoloComm)>, EngineError> {
        Ok((0..active).map(|_| (self.backend.clone(), SoloComm::default())).collect())
    }

    fn weights(&self, _rank: usize) -> &Weights<Cuda> {
        &self.weights
    }
}
