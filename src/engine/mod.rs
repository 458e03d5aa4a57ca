//! The engine: one layer loop for prefill, query and decode, over `Backend` and `Comm`.
//!
//! Invariant: knows no queue, no store and no document; tokens in, tokens out.

mod attention;
mod command;
mod conversation;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_comm;
mod decode;
pub mod devices;
mod digest;
mod eviction;
mod group;
mod host_memory;
mod kv;
mod lead;
mod local;
mod logits;
mod member;
mod open;
mod prefill;
mod rank;
mod ranks;
pub mod schedule;
mod service;

use std::time::Duration;

pub use command::{Command, Feed, Job, OwnedJob, SequenceId};
pub use conversation::{Driver, Timing};
#[cfg(feature = "cuda")]
pub use cuda::{CudaDevices, CudaEngine, CudaEngineOptions};
pub use local::{CpuDevices, LocalEngine, LocalOptions};
pub use open::OpenError;
pub use rank::{Rank, RankError};
pub use ranks::{Following, run};
pub use service::{MAX_HOSTS, ModelEngine};

use serde::{Deserialize, Serialize};

use crate::cost::ModelShape;
use crate::generate::{GenerationOptions, StopReason};
use crate::plan::{AttentionRequest, PrefillPlan};

/// The retaining heads of a model that has them, in its directory.
pub const HEADS_FILE: &str = "retaining_heads.safetensors";

/// One prefill with its generation. Serialisable: it crosses the socket to the engine's process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferRequest {
    /// Tokens up to the end of the document.
    pub context: Vec<u32>,
    /// Tokens after it: instruction and generation prompt. Not empty.
    pub query: Vec<u32>,
    /// Context tokens that stand before the document (BOS, header); the anchor's query follows them.
    pub query_at: usize,
    /// Strategy.
    pub attention: AttentionRequest,
    /// Sampling and stopping.
    pub generation: GenerationOptions,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferOutcome {
    /// Generated tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Their text, special tokens left out.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// The plan that was used.
    pub plan: PrefillPlan,
    /// Context and query through all layers.
    pub prefill: Duration,
    /// Generated tokens.
    pub generate: Duration,
}

/// Where an inference is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "stage")]
pub enum Progress {
    /// It waits for its turn; nothing is begun.
    Waiting,
    /// Layers of the context done.
    Prefill { layers_done: usize, layers: usize },
    /// Tokens generated.
    Generate { tokens: usize, at_most: usize },
}

/// What a caller has to know before it asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineInfo {
    /// Name of the model, for results.
    pub model: String,
    /// Digest over config, weights and heads (what makes two results comparable).
    pub model_digest: String,
    /// Positions at most: context + query + generated.
    pub max_tokens: usize,
    /// Whether the model has retaining heads.
    pub has_retaining_heads: bool,
    /// Inferences that it makes sense to bring at the same time: while one prefills, the others generate together.
    #[serde(default = "one")]
    pub concurrency: usize,
    /// Name of the device or devices.
    pub device: String,
    /// The model's sizes, from which times can be predicted; absent where nobody says.
    #[serde(default)]
    pub shape: Option<ModelShape>,
}

/// Memory beside the weights, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// What a request keeps until its end.
    pub kept_bytes: u64,
    /// What its prefill needs besides; of requests that share an engine one at a time does.
    pub transient_bytes: u64,
    /// What all requests together may need.
    pub available_bytes: u64,
}

impl Demand {
    /// What the request needs alone.
    pub fn needed_bytes(&self) -> u64 {
        self.kept_bytes.saturating_add(self.transient_bytes)
    }
}

fn one() -> usize {
    1
}

/// Why an inference gave nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "error")]
pub enum EngineError {
    /// The request can never work on this model: too long, empty query, a token outside the vocabulary.
    #[error("{reason}")]
    Input { reason: String },
    /// The output can not be made to follow the request's schema; it never will.
    #[error("{reason}")]
    Schema { reason: String },
    /// The context does not fit into the memory there is.
    #[error("the context of {tokens} tokens needs {needed_bytes} bytes, the engine has {available_bytes}")]
    Memory { tokens: usize, needed_bytes: u64, available_bytes: u64 },
    /// The caller cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// The model gave something unusable (non-finite logits).
    #[error("the model failed: {reason}")]
    Model { reason: String },
    /// The device or a rank failed: the engine has to be replaced.
    #[error("the engine failed: {reason}")]
    Device { reason: String },
    /// The engine's process ended under the request.
    #[error("the engine's process ended: {reason}")]
    Crashed { reason: String },
    /// The engine made no progress with it within its budget, and was killed if it did not stop.
    #[error("the engine made no progress with it for {seconds} s")]
    Hung { seconds: u64 },
    /// No engine is there at the moment; nothing was tried.
    #[error("no engine is ready: {reason}")]
    Unavailable { reason: String },
    /// The engines that it fits into have enough to do; nothing was tried.
    #[error("the engines that it fits into have enough to do for {seconds} s")]
    Busy { seconds: u64 },
}

/// Called from the engine's thread between layers and tokens; returning `false` cancels the inference.
pub type Observer<'a> = &'a (dyn Fn(Progress) -> bool + Sync);

/// An engine that is ready. Calls block; the pipeline gives them threads, as many as the engine's concurrency.
pub trait Engine: Send + Sync {
    /// What it serves.
    fn info(&self) -> EngineInfo;
    /// Whether it makes sense to bring it work now.
    fn is_ready(&self) -> bool {
        true
    }
    /// The plan that [`Engine::infer`] would use for so many tokens, or why it would refuse. `query_at` as in [`InferRequest`].
    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        request: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError>;
    /// The memory that a plan with so many generated tokens needs; absent where nobody counts.
    fn demand(&self, _plan: &PrefillPlan, _new_tokens: usize) -> Option<Demand> {
        None
    }
    /// Why it can do nothing any more, if that is so: whoever runs it has to replace it.
    fn over(&self) -> Option<String> {
        None
    }
    /// Runs one request to its end.
    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError>;
}
