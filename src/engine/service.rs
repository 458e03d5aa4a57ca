//! An engine that is ready: admission, plan, generation.
//!
//! Invariant: what would not fit even alone, or can not work, is refused before anything is computed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::cost::ModelShape;
use crate::generate::constraint::ConstraintError;
use crate::generate::generator::{GenerateError, Generator, Step};
use crate::generate::sampler::Choice;
use crate::generate::vocabulary::Vocabulary;
use crate::model::ModelSpec;
use crate::plan::{AttentionRequest, Capabilities, PrefillPlan};

use super::command::Job;
use super::conversation::{Driver, Timing};
use super::devices::{Devices, Memory};
use super::group::{Door, Group, Model};
use super::ranks::{self, Following};
use super::schedule::{Limits, Needs};
use super::{Demand, Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};

/// Hosts at most in one plan: decode keeps a partial result for each.
pub const MAX_HOSTS: usize = 256;

/// Time that prefills may take between two tokens of what generates meanwhile.
const STALL: Duration = Duration::from_millis(200);

/// A model on devices. Without a vocabulary it can prefill and choose tokens, but has no text.
pub struct ModelEngine<D: Devices> {
    name: String,
    digest: String,
    model: Arc<Model<D>>,
    vocabulary: Option<Box<dyn Vocabulary>>,
    /// Started with the first inference.
    group: Mutex<Option<Group>>,
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
        Self { name, digest, model: Arc::new(Model { spec, devices }), vocabulary, group: Mutex::new(None) }
    }

    /// The model's shapes.
    pub fn spec(&self) -> &ModelSpec {
        &self.model.spec
    }

    /// Where it runs.
    pub fn devices(&self) -> &D {
        &self.model.devices
    }

    /// Runs a job with a driver of the caller's own. May be called by several threads at once: one context prefills, the others generate.
    pub fn run(&self, job: &Job<'_>, driver: &mut dyn Driver) -> Result<Timing, EngineError> {
        ranks::check(job)?;
        self.check_tokens(job.context)?;
        self.check_tokens(job.query)?;
        let needs = self.admit(job.plan, job.new_tokens)?;
        self.door()?.run(job, needs, driver)
    }

    /// Joins the ranks now, not with the first inference: on several nodes the others wait for it.
    pub fn join(&self) -> Result<(), EngineError> {
        self.door().map(drop)
    }

    /// On another node than the first: does what that decides, until it has no more to do. Blocks.
    pub fn follow(&self, terms: &Following<'_>) -> Result<(), EngineError> {
        self.model.follow(&self.limits(), terms)
    }

    /// The way to a group that is alive.
    fn door(&self) -> Result<Door, EngineError> {
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(alive) = group.as_ref().filter(|group| group.is_alive()) {
            return Ok(alive.door());
        }
        if let Some(reason) = self.over_of(group.as_ref()) {
            return Err(EngineError::Unavailable { reason });
        }
        // Its threads have ended, and are joined before the devices are used again.
        *group = None;
        Ok(group.insert(Group::start(&self.model, self.limits())?).door())
    }

    /// Why no group will follow this one, if it has ended and its other nodes will not come again.
    fn over_of(&self, group: Option<&Group>) -> Option<String> {
        if self.devices().are_joined_once() { group?.ending() } else { None }
    }

    fn limits(&self) -> Limits {
        Limits { at_once: self.devices().concurrency(), stall: STALL }
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab = self.spec().vocab;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => {
                let reason = format!("token {token} is not in the model's vocabulary of {vocab}");
                Err(EngineError::Input { reason })
            }
            None => Ok(()),
        }
    }

    /// Checks positions, and that it fits alone; what it needs.
    fn admit(&self, plan: &PrefillPlan, new_tokens: usize) -> Result<Needs, EngineError> {
        let (context, query, positions) = (plan.context, plan.query, self.spec().max_positions);
        if context.saturating_add(query).saturating_add(new_tokens) > positions {
            let reason = format!(
                "{context} tokens of context, {query} of query and {new_tokens} to generate are more than the \
                 {positions} positions of the model"
            );
            return Err(EngineError::Input { reason });
        }
        let needed_bytes = self.bytes_for(plan, new_tokens);
        let used = self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Group::used_bytes);
        let available_bytes = self.model.memory(used);
        if needed_bytes > available_bytes {
            return Err(EngineError::Memory { tokens: context, needed_bytes, available_bytes });
        }
        Ok(self.needs(plan, new_tokens))
    }

    /// Bytes that a plan needs with nothing beside it: on the rank that needs most, or on all together where they share one memory.
    pub fn bytes_for(&self, plan: &PrefillPlan, new_tokens: usize) -> u64 {
        let needs = self.needs(plan, new_tokens);
        let own_bytes = needs.kept_bytes.saturating_add(needs.transient_bytes);
        own_bytes.saturating_add(self.model.fixed_bytes(&self.limits()))
    }

    /// What a sequence takes: on the rank that takes most, or on all together where they share one memory.
    fn needs(&self, plan: &PrefillPlan, new_tokens: usize) -> Needs {
        let (footprint, ranks) = (self.model.footprint(), self.devices().ranks());
        let kept = (0..ranks).map(|rank| plan.cache_memory(rank, ranks, new_tokens, &footprint));
        let transient = (0..ranks).map(|rank| plan.prefill_memory(rank, ranks, &footprint));
        let (kept_bytes, transient_bytes) = match self.devices().memory() {
            Memory::Shared(_) => (kept.sum(), transient.sum()),
            Memory::Each(_) => (kept.max().unwrap_or(0), transient.max().unwrap_or(0)),
        };
        Needs {
            layers: self.spec().layers,
            layer_flops: plan.layer_flops(ranks, &footprint),
            query_passes: ranks::query_passes(plan),
            kept_bytes,
            transient_bytes,
        }
    }

    /// The model's sizes as its devices keep it.
    fn shape(&self) -> ModelShape {
        let (spec, footprint) = (self.spec(), self.model.footprint());
        let heads = self.devices().weights(0).retaining_heads.as_ref().and_then(|heads| heads.first());
        ModelShape {
            layers: footprint.layers,
            hidden: footprint.hidden,
            intermediate: footprint.intermediate,
            heads: footprint.heads,
            kv_heads: footprint.kv_heads,
            head_dim: footprint.head_dim,
            vocab: footprint.vocab,
            tied_embeddings: spec.tied_embeddings,
            head_width: heads.map_or(0, |head| head.width),
            element_bytes: footprint.element_bytes,
            kept_row_bytes: footprint.kept_row_bytes,
            scratch_bytes: footprint.scratch_bytes,
        }
    }

    /// Whether the weights hold retaining heads.
    pub fn has_retaining_heads(&self) -> bool {
        self.devices().weights(0).retaining_heads.is_some()
    }
}

impl<D: Devices> Engine for ModelEngine<D> {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            model: self.name.clone(),
            model_digest: self.digest.clone(),
            max_tokens: self.spec().max_positions,
            has_retaining_heads: self.has_retaining_heads(),
            concurrency: self.devices().concurrency(),
            device: self.devices().name(),
            shape: Some(self.shape()),
        }
    }

    fn demand(&self, plan: &PrefillPlan, new_tokens: usize) -> Option<Demand> {
        let needs = self.needs(plan, new_tokens);
        let used = self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Group::used_bytes);
        Some(Demand {
            kept_bytes: needs.kept_bytes,
            transient_bytes: needs.transient_bytes,
            available_bytes: self.model.memory(used).saturating_sub(self.model.fixed_bytes(&self.limits())),
        })
    }

    fn over(&self) -> Option<String> {
        self.over_of(self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref())
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
            Some(schema) => Some(vocabulary.constraint(schema, self.spec().vocab).map_err(generation_error)?),
            None => None,
        };
        let text = |tokens: &[u32]| vocabulary.text(tokens);
        let generator = Generator::new(options, &self.spec().stop_tokens, constraint, &text);
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
