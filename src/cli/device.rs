//! Where the model runs: the options that `run`, `forward` and the engine's process share.
//!
//! Invariant: a backend that is not in this build, or a device that is not in this machine, is a usage error that says so.

use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;

use super::CliError;
use super::place::NodeArgs;
use crate::engine::devices::Devices;
use crate::engine::{Engine, Following, LocalEngine, LocalOptions, ModelEngine};

/// Options of the device.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct DeviceArgs {
    /// Where to compute.
    #[arg(long, value_enum, env = "APBD_BACKEND", default_value_t = BackendName::Cpu)]
    pub backend: BackendName,
    /// Ranks that work on a document together: groups of threads on the CPU, GPUs with cuda. Changes speed, not results.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub ranks: u16,
    /// Numbers of the GPUs to use, one a rank (cuda only); by default the first ones.
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub devices: Vec<usize>,
    /// How keys and values are kept for generation: fp8 halves their memory and costs some exactness (cuda only).
    #[arg(long, value_enum, default_value_t = KvCacheName::Native)]
    pub kv_cache: KvCacheName,
    /// CPU threads of all ranks together; by default as many as the machine has.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Documents to work on at a time: one is read while others are written about. By default as many as make sense (cuda), a few (the daemon's
    /// engines on the CPU), or one after the other (`apbd run` on the CPU, where several at a time gain nothing).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub concurrency: Option<u16>,
    #[command(flatten)]
    pub nodes: NodeArgs,
}

/// Backends of `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum BackendName {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Types of `--kv-cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum KvCacheName {
    /// As they are computed.
    Native,
    /// FP8 (e4m3), a scale for every row and head.
    Fp8,
}

impl KvCacheName {
    /// As the backend has it.
    #[cfg(feature = "cuda")]
    pub fn of_cuda(self) -> crate::backend::cuda::KvCacheType {
        match self {
            Self::Native => crate::backend::cuda::KvCacheType::Bf16,
            Self::Fp8 => crate::backend::cuda::KvCacheType::Fp8,
        }
    }

    /// The name as it is given on the command line.
    #[cfg(feature = "cuda")]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Fp8 => "fp8",
        }
    }
}

impl DeviceArgs {
    /// Opens a model where the options say.
    pub fn open(&self, model: &Path, heads: Option<&Path>) -> Result<Arc<dyn Engine>, CliError> {
        match self.backend {
            BackendName::Cpu => self.joined(self.open_cpu(model, heads)?),
            BackendName::Cuda => self.open_any_cuda(model, heads),
        }
    }

    /// As they are, but that the processor takes one document after the other unless it is told otherwise.
    pub fn one_by_one_on_cpu(&self) -> Self {
        let one = (self.backend == BackendName::Cpu).then_some(1);
        Self { concurrency: self.concurrency.or(one), ..self.clone() }
    }

    /// An engine on several nodes waits for the others before it is ready.
    fn joined<D: Devices>(&self, engine: ModelEngine<D>) -> Result<Arc<dyn Engine>, CliError> {
        if self.nodes.place()?.is_some() {
            engine.join().map_err(|error| CliError::Internal(error.to_string()))?;
        }
        Ok(Arc::new(engine))
    }

    /// On another node than the first: does what that decides.
    pub fn follow(&self, model: &Path, heads: Option<&Path>, terms: &Following<'_>) -> Result<(), CliError> {
        let followed = match self.backend {
            BackendName::Cpu => self.open_cpu(model, heads)?.follow(terms),
            #[cfg(feature = "cuda")]
            BackendName::Cuda => self.open_cuda(model, heads)?.follow(terms),
            #[cfg(not(feature = "cuda"))]
            BackendName::Cuda => return Err(no_cuda()),
        };
        followed.map_err(|error| CliError::Internal(error.to_string()))
    }

    /// Opens a model on the CPU.
    pub fn open_cpu(&self, model: &Path, heads: Option<&Path>) -> Result<LocalEngine, CliError> {
        if self.kv_cache != KvCacheName::Native {
            return Err(CliError::Usage("--kv-cache fp8: with --backend cuda only".to_owned()));
        }
        if !self.devices.is_empty() {
            return Err(CliError::Usage("--devices: with --backend cuda only".to_owned()));
        }
        let mut options =
            LocalOptions { heads: heads.map(Path::to_owned), ranks: self.ranks.into(), ..LocalOptions::default() };
        options.threads = self.threads.map_or(options.threads, usize::from);
        options.concurrency = self.concurrency.map_or(options.concurrency, usize::from);
        options.place = self.nodes.place()?;
        LocalEngine::open(model, &options).map_err(|error| CliError::Usage(error.to_string()))
    }

    #[cfg(feature = "cuda")]
    fn open_any_cuda(&self, model: &Path, heads: Option<&Path>) -> Result<Arc<dyn Engine>, CliError> {
        self.joined(self.open_cuda(model, heads)?)
    }

    #[cfg(not(feature = "cuda"))]
    fn open_any_cuda(&self, _model: &Path, _heads: Option<&Path>) -> Result<Arc<dyn Engine>, CliError> {
        Err(no_cuda())
    }

    /// Opens a model on one or more GPUs.
    #[cfg(feature = "cuda")]
    pub fn open_cuda(&self, model: &Path, heads: Option<&Path>) -> Result<crate::engine::CudaEngine, CliError> {
        let devices = gpus(self.ranks.into(), &self.devices)?;
        let mut options =
            crate::engine::CudaEngineOptions { heads: heads.map(Path::to_owned), devices, ..Default::default() };
        options.backend.kv_cache = self.kv_cache.of_cuda();
        options.concurrency = self.concurrency.map(usize::from);
        options.place = self.nodes.place()?;
        crate::engine::CudaEngine::open(model, &options).map_err(|error| CliError::Usage(error.to_string()))
    }
}

/// The GPUs of so many ranks: those that are named, or the first ones.
#[cfg(feature = "cuda")]
pub(super) fn gpus(ranks: usize, named: &[usize]) -> Result<Vec<usize>, CliError> {
    if named.is_empty() {
        return Ok((0..ranks).collect());
    }
    if let Some(twice) = named.iter().enumerate().find(|(i, device)| named[..*i].contains(device)) {
        return Err(CliError::Usage(format!("--devices: {} is named twice", twice.1)));
    }
    if ranks != 1 && ranks != named.len() {
        let reason = format!("--devices names {} GPUs, --ranks asks for {ranks} ranks: it is one each", named.len());
        return Err(CliError::Usage(reason));
    }
    Ok(named.to_vec())
}

/// What a build without the feature says.
#[cfg(not(feature = "cuda"))]
pub(super) fn no_cuda() -> CliError {
    CliError::Usage("cuda is not in this build; build with `--features cuda`, or use --backend cpu".to_owned())
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_the_first_ones_or_those_that_are_named() {
        assert_eq!(gpus(3, &[]).unwrap(), [0, 1, 2]);
        assert_eq!(gpus(1, &[4, 2]).unwrap(), [4, 2]);
        assert_eq!(gpus(2, &[4, 2]).unwrap(), [4, 2]);
        assert!(gpus(3, &[4, 2]).unwrap_err().to_string().contains("2 GPUs"));
        assert!(gpus(1, &[4, 4]).unwrap_err().to_string().contains("4 is named twice"));
    }
}
