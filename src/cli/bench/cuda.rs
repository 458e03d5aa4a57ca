//! The device of a benchmark, a model of random weights on it, and jobs of random tokens.
//!
//! Invariant: weights and tokens follow from fixed seeds.

use std::sync::{Mutex, PoisonError};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::report::{Row, print, rounded};
use super::{Options, ProductName, Strategy, What, attention, batch, ceilings, decode, mixed, prefill};
use crate::backend::cuda::{Cuda, CudaOptions, ProductPath};
use crate::cli::device::gpus;
use crate::cli::{CliError, Status};
use crate::engine::{CudaDevices, CudaEngine, Engine, EngineError};
use crate::model::weights::Weights;
use crate::plan::{AttentionMode, AttentionRequest, PrefillPlan};

/// Runs a benchmark and prints its figures, the device's ceilings first.
pub(super) fn execute(what: &What) -> Result<Status, CliError> {
    let mut rows = Vec::new();
    let options = match what {
        What::Prefill(options) => prefill::measure(options, &mut rows).map(|()| options),
        What::Decode(options) if options.batch.is_empty() => {
            decode::measure(&options.common, &mut rows).map(|()| &options.common)
        }
        What::Decode(options) => {
            let batches: Vec<_> = options.batch.iter().map(|batch| usize::from(*batch)).collect();
            batch::measure(&options.common, &batches, &mut rows).map(|()| &options.common)
        }
        What::Mixed(options) => mixed::measure(options, &mut rows).map(|()| &options.common),
        What::Attention(options) => attention::measure(options, &mut rows).map(|()| options),
        What::Plan(_) | What::Calibrate(_) => return Ok(Status::Done),
    }?;
    print(&rows, options.format)?;
    Ok(Status::Done)
}

/// The first device.
pub(super) fn device(options: &Options) -> Result<Cuda, CliError> {
    Cuda::open(0, &cuda_options(options)).map_err(failed)
}

fn cuda_options(options: &Options) -> CudaOptions {
    let (kv_cache, products) = (options.kv_cache.of_cuda(), options.products.of_cuda());
    CudaOptions { kv_cache, products, ..CudaOptions::default() }
}

impl ProductName {
    /// As the backend has it.
    fn of_cuda(self) -> ProductPath {
        match self {
            Self::Skinny => ProductPath::Skinny,
            Self::Vector => ProductPath::Vector,
            Self::Library => ProductPath::Library,
        }
    }

    /// The name as it is given on the command line.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Skinny => "skinny",
            Self::Vector => "vector",
            Self::Library => "library",
        }
    }
}

/// A model of random weights on as many devices as there are ranks; the ceilings of the first are among the rows.
pub(super) fn engine(options: &Options, rows: &mut Vec<Row>) -> Result<CudaEngine, CliError> {
    let spec = options.shape.spec();
    let devices = gpus(options.ranks, &options.devices)?;
    let ceilings = Mutex::new(None);
    let load = |cuda: &Cuda| {
        // Before the weights, which would leave too little room.
        if cuda.ordinal() == devices[0] {
            *ceilings.lock().unwrap_or_else(PoisonError::into_inner) = Some(ceilings::measure(cuda, options)?);
        }
        let make = |matrix: crate::model::RandomMatrix| {
            cuda.random_weight(matrix.seed, matrix.scale, matrix.rows, matrix.cols)
        };
        Weights::random(&spec, options.head_width, make)
    };
    let opened = CudaDevices::open(&devices, &cuda_options(options), None, load).map_err(failed)?;
    rows.extend(ceilings.into_inner().unwrap_or_else(PoisonError::into_inner));
    let name = options.shape.as_str().to_owned();
    Ok(CudaEngine::new(name.clone(), name, spec, opened, None))
}

/// Reproducible tokens.
pub(super) fn random_tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(count as u64);
    (0..count).map(|_| random.random_range(0..vocab as u32)).collect()
}

/// The plan of a strategy over so many tokens.
pub(super) fn plan(
    options: &Options,
    engine: &CudaEngine,
    tokens: usize,
    strategy: Strategy,
) -> Result<PrefillPlan, EngineError> {
    let (mode, hosts) = match strategy {
        Strategy::Full => (AttentionMode::Full, None),
        Strategy::Ring => (AttentionMode::Ring, Some(options.hosts)),
        Strategy::Ulysses => (AttentionMode::Ulysses, Some(options.hosts)),
        Strategy::Star => (AttentionMode::Star, Some(options.hosts)),
        Strategy::Apb => (AttentionMode::Apb, Some(options.hosts)),
    };
    let request = AttentionRequest {
        mode: Some(mode),
        hosts,
        anchor: options.anchor.filter(|_| strategy == Strategy::Apb),
        passing: options.passing.filter(|_| strategy == Strategy::Apb),
        execution: options.execution.of_plan(),
        ..AttentionRequest::default()
    };
    engine.plan(tokens, options.query, 0, &request)
}

/// A row that says why there are no figures, where it is the memory.
pub(super) fn refusal(
    options: &Options,
    tokens: usize,
    strategy: Strategy,
    error: EngineError,
) -> Result<Row, CliError> {
    let EngineError::Memory { needed_bytes, available_bytes, .. } = error else { return Err(engine_failed(error)) };
    let gib = |bytes: u64| rounded(bytes as f64 / f64::from(1 << 30), 1);
    let json = json!({
        "what": "out of memory", "shape": options.shape.as_str(), "attention": format!("{strategy:?}").to_lowercase(), "tokens": tokens,
        "hosts": options.hosts, "gpus": options.gpus(), "needed_gib": gib(needed_bytes), "available_gib": gib(available_bytes)
    });
    Ok(json.as_object().cloned().unwrap_or_default())
}

/// What a row says of the run it belongs to.
pub(super) fn row(options: &Options, plan: &PrefillPlan) -> Row {
    let json = json!({
        "what": "", "shape": options.shape.as_str(), "attention": format!("{:?}", plan.mode).to_lowercase(), "tokens": plan.context,
        "hosts": plan.hosts.len(), "anchor": plan.anchor.as_ref().map_or(0, |anchor| anchor.len),
        "passing": plan.hosts.iter().map(|host| host.compressed).max(), "gpus": plan.active_ranks(options.gpus()),
        "placement": plan.execution.placement, "overlap": plan.execution.overlap, "passing_type": plan.execution.passing_type
    });
    json.as_object().cloned().unwrap_or_default()
}

pub(super) fn failed(error: crate::backend::BackendError) -> CliError {
    match error {
        crate::backend::BackendError::Unavailable(reason) => CliError::Usage(reason),
        error => CliError::Internal(error.to_string()),
    }
}

pub(super) fn engine_failed(error: EngineError) -> CliError {
    match error {
        EngineError::Input { .. } | EngineError::Memory { .. } => CliError::Usage(error.to_string()),
        error => CliError::Internal(error.to_string()),
    }
}
