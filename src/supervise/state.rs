//! What the callers of one supervised engine share: its child, who is in it, and what to think of it.
//!
//! Invariant: the lock is held for moments only, never while a child works, starts or ends. Of those who see a child fail, the first decides
//! what it means for all; the others learn it from their own [`Fate`].

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::EngineOptions;
use super::breaker::Breaker;
use super::culprits::Culprits;
use super::flights::{Fate, Flights};
use super::process::Process;
use crate::engine::{EngineError, EngineInfo};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// Contexts from this length on say how fast an engine is; of shorter ones most of the time is not theirs.
const MEASURED_FROM_TOKENS: usize = 1024;

/// Whether an engine can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outlook {
    /// Now.
    Ready,
    /// Soon: one is being started.
    Coming,
    /// Not soon, and why.
    Down(String),
}

/// One engine: what it is, and what it is at.
pub(super) struct Supervisor {
    pub options: EngineOptions,
    /// What the first child said of itself.
    pub info: EngineInfo,
    state: Mutex<State>,
    /// Anything in `state` that somebody may wait for has changed.
    changed: Condvar,
    /// Nobody needs the engine any more.
    pub stop: AtomicBool,
    /// Shared with the other engines of its pool.
    culprits: Arc<Mutex<Culprits>>,
    health: Component,
}

pub(super) struct State {
    child: Option<Child>,
    pub breaker: Breaker,
    pub flights: Flights,
    next_id: u64,
    /// Slowest prefill seen, in context tokens a second; unknown before the first.
    tokens_per_s: Option<f64>,
    /// Why the last start of a child failed, until one succeeds.
    fault: Option<String>,
}

struct Child {
    process: Arc<Process>,
    /// Requests that it takes at a time.
    capacity: usize,
}

impl State {
    /// An id that no message has carried yet.
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The child, if there is one.
    pub fn process(&self) -> Option<&Arc<Process>> {
        self.child.as_ref().map(|child| &child.process)
    }

    /// Requests that could be brought now.
    pub fn room(&self) -> usize {
        let open = self.breaker.open_for(Instant::now()).is_some();
        if open { 0 } else { self.child.as_ref().map_or(0, |child| self.flights.room(self.capacity(child))) }
    }

    /// Lets a request into the child, if its turn has come.
    pub fn start(&mut self, id: u64) -> Option<Arc<Process>> {
        let child = self.child.as_ref()?;
        if !self.flights.may_start(id, self.capacity(child)) {
            return None;
        }
        self.flights.set_running(id, true);
        Some(child.process.clone())
    }

    /// Whether there is, or will be, an engine.
    pub fn outlook(&self) -> Outlook {
        if let Some(left) = self.breaker.open_for(Instant::now()) {
            return Outlook::Down(format!("it keeps dying; the next try is in {} s", left.as_secs().max(1)));
        }
        match (&self.child, &self.fault) {
            (Some(_), _) => Outlook::Ready,
            (None, Some(fault)) => Outlook::Down(fault.clone()),
            (None, None) => Outlook::Coming,
        }
    }

    /// Why a request that waits should not.
    pub fn refusal(&mut self, id: u64) -> Option<EngineError> {
        if let Outlook::Down(reason) = self.outlook() {
            return Some(EngineError::Unavailable { reason });
        }
        match self.flights.fate(id) {
            Some(Fate::Released) => {
                Some(EngineError::Unavailable { reason: "it ended under another request".to_owned() })
            }
            _ => None,
        }
    }

    /// After failures in a row one at a time tries, so that the next failure has an author.
    fn capacity(&self, child: &Child) -> usize {
        if self.breaker.is_probing() { 1 } else { child.capacity }
    }

    /// A prefill of `context` tokens took so long.
    pub fn measured(&mut self, context: usize, prefill: Duration) {
        if context >= MEASURED_FROM_TOKENS {
            let rate = context as f64 / prefill.as_secs_f64().max(1e-3);
            self.tokens_per_s = Some(self.tokens_per_s.map_or(rate, |slowest| slowest.min(rate)));
        }
    }

    /// How long may pass without a sign of progress of a request.
    pub fn budget(&self, context: usize, options: &EngineOptions) -> Duration {
        let predicted = self.tokens_per_s.map_or(0.0, |rate| context as f64 / rate);
        let allowed = Duration::try_from_secs_f64(predicted * options.silence_factor);
        allowed.unwrap_or(Duration::MAX).max(options.silence_floor)
    }
}

impl Supervisor {
    /// With a first child that is ready.
    pub fn new(
        options: EngineOptions,
        process: Process,
        info: EngineInfo,
        health: Component,
        culprits: Arc<Mutex<Culprits>>,
    ) -> Self {
        health.ready();
        let child = Some(Child { process: Arc::new(process), capacity: info.concurrency.max(1) });
        let (breaker, flights) = (Breaker::default(), Flights::default());
        let state = Mutex::new(State { child, breaker, flights, next_id: 0, tokens_per_s: None, fault: None });
        let (changed, stop) = (Condvar::new(), AtomicBool::new(false));
        Self { options, info, state, changed, stop, culprits, health }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn culprits(&self) -> MutexGuard<'_, Culprits> {
        self.culprits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something may have changed.
    pub fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Wakes all who wait.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    /// A new child is ready.
    pub fn started(&self, process: Process, info: &EngineInfo) {
        info!(engine.group = self.options.group, engine.pid = process.id(), "a new engine is ready");
        let mut state = self.state();
        state.fault = None;
        state.child = Some(Child { process: Arc::new(process), capacity: info.concurrency.max(1) });
        self.health.ready();
        self.notify();
    }

    /// No child could be started.
    pub fn not_started(&self, reason: String) {
        warn!(engine.group = self.options.group, error.message = reason, "the engine does not start");
        metrics::ENGINE_ENDS.add(&[&self.options.group, "not_started"], 1);
        let mut state = self.state();
        state.breaker.failed(Instant::now());
        self.health.degraded(&reason);
        state.fault = Some(reason);
        self.notify();
    }

    /// A child is given up: what it says or does from now on is nobody's. `culprit` has done it, if that is known. Another one is started
    /// by the keeper. Nothing happens if the child was given up before.
    pub fn give_up(&self, process: &Arc<Process>, kind: &'static str, reason: &str, culprit: Option<u64>) {
        let mut state = self.state();
        if !state.process().is_some_and(|current| Arc::ptr_eq(current, process)) {
            return;
        }
        state.child = None;
        let running = state.flights.running();
        state.flights.child_ended(culprit);
        let open = state.breaker.failed(Instant::now());
        warn!(
            error.kind = kind,
            error.message = reason,
            engine.group = self.options.group,
            engine.pid = process.id(),
            engine.requests = running,
            engine.given_up = open,
            "the engine is replaced"
        );
        self.health.degraded(&format!("the engine is replaced: {reason}"));
        metrics::ENGINE_ENDS.add(&[&self.options.group, kind], 1);
        drop(state);
        process.kill();
        self.notify();
    }
}
