//! An engine that is ready: admission, plan, ranks, generation.
//!
//! Invariant: one inference at a time; what would not fit, or can not work, is refused before anything is computed.

use std::sync::{Mutex, PoisonError};

use crate::generate::constraint::ConstraintError;
use crate::generate::generator::{GenerateError, Generator, Step};
use crate::generate::sampler::Choice;
use crate::generate::vocabulary::Vocabulary;
use crate::model::ModelSpec;
use crate::plan::{AttentionRequest, Capabilities, Footprint, PrefillPlan};

use super::control::Driver;
use super::devices::{Devices, Memory};
use super::infer::{Job, Timing};
use super::rank::Rank;
use super::{Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};

/// Hosts at most in one plan: decode keeps a partial result for each.
pub const MAX_HOSTS: usize = 256;

/// A model on devices. Without a vocabulary it can prefill and choose tokens, but has no text.
pub struct ModelEngine<D: Devices> {
    name: String,
    digest: String,
    spec: ModelSpec,
    devices: D,
    vocabulary: Option<Box<dyn Vocabulary>>,
    busy: Mutex<()>,
}

impl<D: Devices> ModelEngine<D> {
    /// `digest` tells models apart; `vocabulary` is needed by [`Engine::infer`] alone.
    pub fn new(
        name: String,
        digest: String,
        spec: ModelSpec,
        devices: D,
        vocabulary: Option<Box<dyn Vocabulary>>,
    ) -> Self {
        Self { name, digest, spec, devices, vocabulary, busy: Mutex::new(()) }
    }

    /// The model's shapes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Where it runs.
    pub fn devices(&self) -> &D {
        &self.devices
    }

    /// Runs a job with a driver of the caller's own.
    pub fn run(&self, job: &Job<'_>, driver: &mut dyn Driver) -> Result<Timing, EngineError> {
        self.check_tokens(job.context)?;
        self.check_tokens(job.query)?;
        // A caller that panicked has left nothing behind: every inference has its own state.
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.admit(job.plan, job.new_tokens)?;
        let members = self.devices.connect(job.plan.active_ranks(self.devices.ranks()))?;
        let (backends, comms): (Vec<_>, Vec<_>) = members.into_iter().unzip();
        let mut ranks = Vec::with_capacity(backends.len());
        for (index, (backend, comm)) in backends.iter().zip(comms).enumerate() {
            ranks.push(Rank { backend: &**backend, comm, weights: self.devices.weights(index), spec: &self.spec });
        }
        super::ranks::run(ranks, job, driver)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab = self.spec.vocab;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => {
                let reason = format!("token {token} is not in the model's vocabulary of {vocab}");
                Err(EngineError::Input { reason })
            }
            None => Ok(()),
        }
    }

    /// Checks positions and memory.
    fn admit(&self, plan: &PrefillPlan, new_tokens: usize) -> Result<(), EngineError> {
        let (context, query, positions) = (plan.context, plan.query, self.spec.max_positions);
        if context.saturating_add(query).saturating_add(new_tokens) > positions {
            let reason = format!(
                "{context} tokens of context, {query} of query and {new_tokens} to generate are more than the \
                 {positions} positions of the model"
            );
            return Err(EngineError::Input { reason });
        }
        let (footprint, ranks) = (self.footprint(), plan.active_ranks(self.devices.ranks()));
        let (needed_bytes, available_bytes) = match self.devices.memory() {
            Memory::Shared(available) => (plan.memory(ranks, new_tokens, &footprint), available),
            Memory::Each(available) => {
                let of_rank = |rank| plan.memory_of_rank(rank, ranks, new_tokens, &footprint);
                ((0..ranks).map(of_rank).max().unwrap_or(0), available)
            }
        };
        if needed_bytes > available_bytes {
            return Err(EngineError::Memory { tokens: context, needed_bytes, available_bytes });
        }
        Ok(())
    }

    fn footprint(&self) -> Footprint {
        let shape = self.spec.shape;
        Footprint {
            layers: self.spec.layers,
            hidden: self.spec.hidden,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            element_bytes: self.devices.element_bytes(),
            kept_row_bytes: self.devices.kept_row_bytes(shape),
            scratch_bytes: self.devices.scratch_bytes(&self.spec),
        }
    }

    /// Whether the weights hold retaining heads.
    pub fn has_retaining_heads(&self) -> bool {
        self.devices.weights(0).retaining_heads.is_some()
    }
}

impl<D: Devices> Engine for ModelEngine<D> {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            model: self.name.clone(),
            model_digest: self.digest.clone(),
            max_tokens: self.spec.max_positions,
            has_retaining_heads: self.has_retaining_heads(),
            concurrency: 1,
            device: self.devices.name(),
        }
    }

    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        request: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        let capabilities = Capabilities { has_retaining_heads: self.has_retaining_heads(), max_hosts: MAX_HOSTS };
        let plan = PrefillPlan::new(context, query, query_at, request, capabilities)
            .map_err(|error| EngineError::Input { reason: error.to_string() })?;
        self.admit(&plan, 0)?;
        Ok(plan)
    }

    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let Some(vocabulary) = &self.vocabulary else {
            return Err(EngineError::Input { reason: "the model has no tokenizer".to_owned() });
        };
        let options = &request.generation;
        options.check().map_err(|reason| EngineError::Input { reason })?;
        let plan = self.plan(request.context.len(), request.query.len(), request.query_at, &request.attention)?;
        let constraint = match &options.schema {
            Some(schema) => Some(vocabulary.constraint(schema, self.spec.vocab).map_err(generation_error)?),
            None => None,
        };
        let text = |tokens: &[u32]| vocabulary.text(tokens);
        let generator = Generator::new(options, &self.spec.stop_tokens, constraint, &text);
        let mut driver = Inference { generator, observer };
        let new_tokens = options.max_new_tokens;
        let job = Job { context: &request.context, query: &request.query, plan: &plan, new_tokens };
        let timing = self.run(&job, &mut driver)?;
        let generated = driver.generator.finish();
        Ok(InferOutcome {
            tokens: generated.tokens,
            text: generated.text,
            stop: generated.stop,
            plan,
            prefill: timing.prefill,
            generate: timing.generate,
        })
    }
}

/// Generation for a request, observed by its caller.
struct Inference<'a> {
    generator: Generator<'a>,
    observer: Observer<'a>,
}

impl Driver for Inference<'_> {
    fn progress(&mut self, progress: Progress) -> bool {
        (self.observer)(progress)
    }

    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        self.generator.next(logits).map_err(step_error)
    }

    fn choice(&mut self) -> Option<Choice> {
        self.generator.choice()
    }

    fn take(&mut self, chosen: u32) -> Result<Step, EngineError> {
        self.generator.take(chosen).map_err(step_error)
    }
}

fn step_error(error: GenerateError) -> EngineError {
    match error {
        GenerateError::Constraint(error) => generation_error(error),
        error => EngineError::Model { reason: error.to_string() },
    }
}

fn generation_error(error: ConstraintError) -> EngineError {
    match error {
        ConstraintError::Unusable { .. } => EngineError::Schema { reason: error.to_string() },
        ConstraintError::Failed { .. } => EngineError::Model { reason: error.to_string() },
    }
}
