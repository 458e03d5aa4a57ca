//! The engine as the pipeline sees it: a child that is started, watched and replaced.
//!
//! Invariant: a request ends within its budget of silence, by an answer or by the child's death; no request meets a child that failed before. While
//! there is no child, one is being started or waited for, whether there is work or not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::breaker::Breaker;
use super::process::{Heard, Process};
use super::wire::{Answer, Ask};
use crate::engine::{Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};
use crate::plan::{AttentionRequest, PrefillPlan};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// How often a running request is asked whether its caller still wants it.
const TICK: Duration = Duration::from_millis(100);

/// Pause between two tries to start a child, while the breaker allows them.
const START_PAUSE: Duration = Duration::from_secs(1);

/// How the child is run and watched.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Program and arguments.
    pub program: Vec<String>,
    /// Time to load the model.
    pub start_within: Duration,
    /// Silence that is borne at least.
    pub silence_floor: Duration,
    /// Silence that is borne, in multiples of the predicted time.
    pub silence_factor: f64,
}

/// The engine behind its process.
pub struct SupervisedEngine(Arc<Supervisor>);

struct Supervisor {
    options: EngineOptions,
    info: EngineInfo,
    state: Mutex<State>,
    /// Whether there is a child, without waiting for the request that it works on.
    has_child: AtomicBool,
    health: Component,
}

struct State {
    process: Option<Process>,
    breaker: Breaker,
    /// Slowest rate seen, in context tokens a second; unknown before the first success.
    tokens_per_s: Option<f64>,
}

impl SupervisedEngine {
    /// Starts the first child, and waits for its model.
    pub fn start(options: EngineOptions, health: Component) -> Result<Self, String> {
        let (process, info) = Process::start(&options.program, options.start_within)?;
        info!(engine.pid = process.id(), engine.model = info.model, engine.device = info.device, "the engine is ready");
        health.ready();
        let state = State { process: Some(process), breaker: Breaker::default(), tokens_per_s: None };
        let (state, has_child) = (Mutex::new(state), AtomicBool::new(true));
        Ok(Self(Arc::new(Supervisor { options, info, state, has_child, health })))
    }
}

impl Supervisor {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A child to speak to: the one there is, or a new one.
    fn living<'a>(&self, state: &'a mut State) -> Result<&'a mut Process, EngineError> {
        if let Some(left) = state.breaker.open_for(Instant::now()) {
            let reason = format!("it keeps dying; the next try is in {} s", left.as_secs().max(1));
            return Err(EngineError::Unavailable { reason });
        }
        if state.process.is_none() {
            match Process::start(&self.options.program, self.options.start_within) {
                Ok((process, info)) if info.model_digest == self.info.model_digest => {
                    info!(engine.pid = process.id(), "a new engine is ready");
                    self.health.ready();
                    self.has_child.store(true, Ordering::Relaxed);
                    state.process = Some(process);
                }
                Ok(_) => {
                    let reason = "its model is not the one the daemon started with; restart the daemon".to_owned();
                    return Err(self.not_started(state, reason));
                }
                Err(reason) => return Err(self.not_started(state, reason)),
            }
        }
        state.process.as_mut().ok_or_else(|| EngineError::Unavailable { reason: "it could not be started".to_owned() })
    }

    fn not_started(&self, state: &mut State, reason: String) -> EngineError {
        error!(error.message = reason, "the engine does not start");
        state.breaker.failed(Instant::now());
        self.health.degraded(&reason);
        metrics::ENGINE_ENDS.add(&["not_started"], 1);
        EngineError::Unavailable { reason }
    }

    /// Kills the child: what it says or does from now on is nobody's. Another one is started meanwhile.
    fn replace(self: &Arc<Self>, state: &mut State, kind: &'static str, reason: &str) {
        state.process = None;
        self.has_child.store(false, Ordering::Relaxed);
        let open = state.breaker.failed(Instant::now());
        warn!(error.kind = kind, error.message = reason, engine.given_up = open, "the engine is replaced");
        self.health.degraded(&format!("the engine is replaced: {reason}"));
        metrics::ENGINE_ENDS.add(&[kind], 1);
        let supervisor = Arc::downgrade(self);
        let reviving = thread::Builder::new().name("apbd-engine-start".to_owned()).spawn(move || {
            // Whoever comes first, this or the next request, starts it.
            while let Some(pause) = supervisor.upgrade().and_then(|supervisor| supervisor.revive()) {
                thread::sleep(pause);
            }
        });
        if let Err(error) = reviving {
            warn!(error.message = %error, "the engine is not started before the next request");
        }
    }

    /// Starts a child if there is none; how long to wait before the next try if that failed.
    fn revive(&self) -> Option<Duration> {
        let mut state = self.state();
        if self.living(&mut state).is_ok() {
            return None;
        }
        Some(state.breaker.open_for(Instant::now()).unwrap_or_default().max(START_PAUSE))
    }

    /// How long may pass without a sign of progress.
    fn budget(&self, context: usize, tokens_per_s: Option<f64>) -> Duration {
        let predicted = tokens_per_s.map_or(0.0, |rate| context as f64 / rate);
        let allowed = Duration::try_from_secs_f64(predicted * self.options.silence_factor);
        allowed.unwrap_or(Duration::MAX).max(self.options.silence_floor)
    }

    fn attend(
        &self,
        process: &mut Process,
        budget: Duration,
        observer: Observer<'_>,
    ) -> Result<Box<InferOutcome>, EngineError> {
        let (mut heard_at, mut cancelled) = (Instant::now(), false);
        let mut last = Progress::Prefill { layers_done: 0, layers: 0 };
        loop {
            match process.hear(TICK) {
                Heard::Said(Answer::Done { result }) => return result,
                Heard::Said(Answer::Progress { progress }) => (last, heard_at) = (progress, Instant::now()),
                Heard::Said(_) | Heard::Nothing => {}
                Heard::Gone(reason) => return Err(EngineError::Crashed { reason }),
            }
            if heard_at.elapsed() >= budget {
                return Err(EngineError::Hung { seconds: budget.as_secs() });
            }
            if !cancelled && !observer(last) {
                cancelled = process.say(&Ask::Cancel);
            }
        }
    }

    /// Asks the child for a plan.
    fn plan(self: &Arc<Self>, ask: &Ask) -> Result<PrefillPlan, EngineError> {
        let mut guard = self.state();
        let state = &mut *guard;
        let process = self.living(state)?;
        let failed = if process.say(ask) {
            match process.hear(self.options.silence_floor) {
                Heard::Said(Answer::Planned { result }) => return result.map(|plan| *plan),
                Heard::Gone(reason) => reason,
                Heard::Said(_) | Heard::Nothing => "it gives no plan".to_owned(),
            }
        } else {
            "it does not listen".to_owned()
        };
        self.replace(state, "crashed", &failed);
        Err(EngineError::Crashed { reason: failed })
    }

    /// Has the child run a request.
    fn infer(self: &Arc<Self>, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let mut guard = self.state();
        let state = &mut *guard;
        let budget = self.budget(request.context.len(), state.tokens_per_s);
        // A child may have died since the last request: that is not this one's doing.
        for is_last in [false, true] {
            let asked = self.living(state)?.say(&Ask::Infer { request: Box::new(request.clone()) });
            match asked {
                true => break,
                false if is_last => return Err(EngineError::Unavailable { reason: "it does not listen".to_owned() }),
                false => self.replace(state, "died_idle", "it ended while it was idle"),
            }
        }
        let began = Instant::now();
        let process = self.living(state)?;
        match self.attend(process, budget, observer) {
            Ok(outcome) => {
                state.breaker.succeeded();
                let rate = request.context.len() as f64 / began.elapsed().as_secs_f64().max(1e-3);
                state.tokens_per_s = Some(state.tokens_per_s.map_or(rate, |slowest| slowest.min(rate)));
                Ok(*outcome)
            }
            Err(error) => {
                match &error {
                    EngineError::Crashed { reason } => self.replace(state, "crashed", reason),
                    EngineError::Hung { .. } => self.replace(state, "hung", &error.to_string()),
                    EngineError::Device { reason } => self.replace(state, "device", reason),
                    _ => {}
                }
                Err(error)
            }
        }
    }
}

impl Engine for SupervisedEngine {
    fn info(&self) -> EngineInfo {
        self.0.info.clone()
    }

    fn is_ready(&self) -> bool {
        self.0.has_child.load(Ordering::Relaxed)
    }

    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        attention: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        self.0.plan(&Ask::Plan { context, query, query_at, attention: attention.clone() })
    }

    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        self.0.infer(request, observer)
    }
}
