//! The device of a benchmark, a model of random weights on it, and jobs of random tokens.
//!
//! Invariant: weights and tokens follow from fixed seeds.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use super::report::{Row, print};
use super::{Options, Strategy, What, attention, ceilings, decode, prefill};
use crate::backend::cuda::{Cuda, CudaOptions};
use crate::cli::{CliError, Status};
use crate::engine::{CudaDevices, CudaEngine, Engine, EngineError};
use crate::model::weights::Weights;
use crate::plan::{AttentionMode, AttentionRequest, PrefillPlan};

/// Runs a benchmark and prints its figures, the device's ceilings first.
pub(super) fn execute(what: &What) -> Result<Status, CliError> {
    let mut rows = Vec::new();
    let options = match what {
        What::Prefill(options) => prefill::measure(options, &mut rows).map(|()| options),
        What::Decode(options) => decode::measure(options, &mut rows).map(|()| options),
        What::Attention(options) => attention::measure(options, &mut rows).map(|()| options),
        What::Plan(_) | What::Calibrate(_) => return Ok(Status::Done),
    }?;
    print(&rows, options.format)?;
    Ok(Status::Done)
}

/// The first device, and its ceilings among the rows.
pub(super) fn device(options: &Options, rows: &mut Vec<Row>) -> Result<Cuda, CliError> {
    let device = CudaOptions { kv_cache: options.kv_cache.of_cuda(), ..CudaOptions::default() };
    let cuda = Cuda::open(0, &device).map_err(failed)?;
    rows.push(ceilings::measure(&cuda, options).map_err(failed)?);
    Ok(cuda)
}

/// A model of random weights.
pub(super) fn engine(options: &Options, cuda: Cuda) -> Result<CudaEngine, CliError> {
    let spec = options.shape.spec();
    let make =
        |matrix: crate::model::RandomMatrix| cuda.random_weight(matrix.seed, matrix.scale, matrix.rows, matrix.cols);
    let weights = Weights::random(&spec, options.head_width, make).map_err(failed)?;
    let name = options.shape.as_str().to_owned();
    Ok(CudaEngine::new(name.clone(), name, spec, CudaDevices::new(cuda, weights), None))
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
) -> Result<PrefillPlan, CliError> {
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
    engine.plan(tokens, options.query, 0, &request).map_err(engine_failed)
}

/// What a row says of the run it belongs to.
pub(super) fn row(options: &Options, plan: &PrefillPlan) -> Row {
    let json = json!({
        "what": "", "shape": options.shape.as_str(), "attention": format!("{:?}", plan.mode).to_lowercase(), "tokens": plan.context,
        "hosts": plan.hosts.len(), "anchor": plan.anchor.as_ref().map_or(0, |anchor| anchor.len),
        "passing": plan.hosts.iter().map(|host| host.compressed).max()
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
