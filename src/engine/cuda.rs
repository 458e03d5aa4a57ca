//! The engine on GPUs: a rank on each, weights and everything else in each one's memory, joined by NCCL where there are several.
//!
//! Invariant: what an inference needs is known to fit on every device before it starts; a device that failed is never used again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::backend::HeadShape;
use crate::backend::cuda::{Cuda, CudaOptions, ELEMENT_BYTES, ScratchShape, in_ring_order};
use crate::comm::hub::Place;
use crate::comm::nccl::{Deadlines, NcclComm};
use crate::comm::solo::SoloComm;
use crate::model::ModelSpec;
use crate::model::weights::Weights;

use super::EngineError;
use super::cuda_comm::CudaComm;
use super::devices::{Connected, Devices, Memory};
use super::open::OpenError;
use super::service::ModelEngine;

/// Left free for what is small and not counted: work lists, positions, token ids, keys of the selection.
const UNCOUNTED_BYTES: u64 = 128 << 20;
/// What NCCL takes on a device for its buffers and connections.
const NCCL_BYTES: usize = 2 << 30;

/// Sequences at a time: as many keys and values as one launch of attention reads from, less some for the context that prefills.
const CONCURRENCY: usize = 48;

/// Until all GPUs of a group are connected; loading NCCL and finding the links takes seconds.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How long a rank waits for the others in a collective while none of them comes further. One that fails is noticed at once; this is for one that is
/// stuck, and longer than the few layers, of any context that fits, after which a rank is heard of at the latest.
const PEER_DEADLINE: Duration = Duration::from_secs(120);

/// How to open a model on GPUs.
#[derive(Debug, Clone, Default)]
pub struct CudaEngineOptions {
    /// Retaining heads; absent: those in the model's directory, if any.
    pub heads: Option<PathBuf>,
    /// Numbers of the devices, one a rank; none is the first device. Ranks are put in the order of the links between them.
    pub devices: Vec<usize>,
    /// Memory and kernels.
    pub backend: CudaOptions,
    /// Sequences at a time; absent: as many as make sense.
    pub concurrency: Option<usize>,
    /// This node's place among several, each of which has as many devices.
    pub place: Option<Place>,
}

/// GPUs, each with a model's weights on it; by rank.
pub struct CudaDevices {
    members: Vec<Member>,
    place: Option<Place>,
    concurrency: usize,
}

struct Member {
    // Before the device, whose memory they are in.
    weights: Weights<Cuda>,
    backend: Arc<Cuda>,
}

/// An engine on GPUs.
pub type CudaEngine = ModelEngine<CudaDevices>;

impl ModelEngine<CudaDevices> {
    /// Opens a model directory: `config.json` and weights, a tokenizer if there is one, retaining heads if there are any.
    pub fn open(directory: &Path, options: &CudaEngineOptions) -> Result<Self, OpenError> {
        Self::open_on(directory, options.heads.as_deref(), |files| {
            let load = |backend: &Cuda| -> Result<_, OpenError> {
                Ok(Weights::load(backend, files.directory, &files.spec, files.heads.as_deref())?)
            };
            let devices = CudaDevices::open(&options.devices, &options.backend, options.place.as_ref(), load)?;
            let concurrency = options.concurrency.unwrap_or(CONCURRENCY).clamp(1, CONCURRENCY);
            Ok(CudaDevices { concurrency, ..devices })
        })
    }
}

impl CudaDevices {
    /// Opens devices and has `load` put weights on each, on all at the same time.
    pub fn open<E>(
        devices: &[usize],
        options: &CudaOptions,
        place: Option<&Place>,
        load: impl Fn(&Cuda) -> Result<Weights<Cuda>, E> + Sync,
    ) -> Result<Self, E>
    where
        E: From<crate::backend::BackendError> + Send,
    {
        let devices = in_ring_order(if devices.is_empty() { &[0] } else { devices })?;
        let is_group = devices.len() > 1 || place.is_some();
        let others_bytes = options.others_bytes + if is_group { NCCL_BYTES } else { 0 };
        let options = CudaOptions { others_bytes, ..*options };
        let member = |device: usize| {
            let backend = Cuda::open(device, &options)?;
            let weights = load(&backend)?;
            Ok(Member { weights, backend: Arc::new(backend) })
        };
        let members = thread::scope(|scope| {
            let member = &member;
            let threads: Vec<_> = devices.into_iter().map(|device| scope.spawn(move || member(device))).collect();
            let joined =
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
            joined.collect::<Result<Vec<_>, E>>()
        })?;
        Ok(Self { members, place: place.cloned(), concurrency: CONCURRENCY })
    }

    /// The device of rank 0.
    pub fn backend(&self) -> &Cuda {
        &self.members[0].backend
    }

    /// The devices, by rank.
    pub fn backends(&self) -> impl Iterator<Item = &Arc<Cuda>> {
        self.members.iter().map(|member| &member.backend)
    }
}

impl Devices for CudaDevices {
    type Backend = Cuda;
    type Comm = CudaComm;

    fn name(&self) -> String {
        let device = self.backend().device_name();
        let here = match self.members.len() {
            1 => format!("cuda ({device})"),
            several => format!("{several} x cuda ({device})"),
        };
        match &self.place {
            Some(place) => format!("{here} on {} nodes", place.nodes),
            None => here,
        }
    }

    fn ranks(&self) -> usize {
        self.members.len() * self.place.as_ref().map_or(1, |place| place.nodes)
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    fn element_bytes(&self) -> usize {
        ELEMENT_BYTES
    }

    fn kept_row_bytes(&self, shape: HeadShape) -> usize {
        self.backend().kv_cache().bytes(2 * shape.kv_width(), shape.head_dim)
    }

    fn scratch_bytes(&self, spec: &ModelSpec) -> u64 {
        let heads = self.weights(0).retaining_heads.as_ref();
        let head_width = heads.and_then(|heads| heads.first()).map_or(0, |head| head.w2.cols());
        let shape = ScratchShape { heads: spec.shape, intermediate: spec.intermediate, head_width };
        self.backend().scratch_bytes(&shape)
    }

    fn memory(&self) -> Memory {
        let free = self.backends().map(|backend| backend.free_bytes()).min().unwrap_or(0);
        Memory::Each((free as u64).saturating_sub(UNCOUNTED_BYTES))
    }

    fn are_joined_once(&self) -> bool {
        self.place.is_some()
    }

    fn connect(&self) -> Result<Connected<Self>, EngineError> {
        let backends: Vec<_> = self.backends().cloned().collect();
        let deadlines = Deadlines { start: START_DEADLINE, collective: PEER_DEADLINE };
        let joined = match &self.place {
            Some(place) => NcclComm::group_at(place, &backends, deadlines).map(|(ends, side)| (ends, Some(side))),
            None if backends.len() > 1 => NcclComm::group(&backends, deadlines).map(|ends| (ends, None)),
            None => {
                let member = |backend| (backend, CudaComm::Alone(SoloComm::default()));
                return Ok(Connected { members: backends.into_iter().map(member).collect(), side: None });
            }
        };
        let (ends, side) = joined.map_err(|error| EngineError::Device { reason: error.to_string() })?;
        Ok(Connected { members: backends.into_iter().zip(ends.into_iter().map(CudaComm::Group)).collect(), side })
    }

    fn weights(&self, index: usize) -> &Weights<Cuda> {
        &self.members[index].weights
    }
}
