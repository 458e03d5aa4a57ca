//! The engine as the pipeline sees it: a child that is started, watched and replaced, and that many requests share.
//!
//! Invariant: a request ends within its budget of silence, by an answer or by the child's death; no request meets a child that failed before.
//! While there is no child, one is being started or waited for, whether there is work or not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tracing::info;

use super::culprits::{Culprits, Fingerprint};
use super::flights::Fate;
use super::keeper;
use super::process::Process;
use super::state::{Outlook, Supervisor};
use super::wire::{Answer, Ask};
use crate::engine::{Demand, Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};
use crate::plan::{AttentionRequest, PrefillPlan};
use crate::telemetry::health::Component;

/// How often a request is asked whether its caller still wants it, and its child whether it lives.
const TICK: Duration = Duration::from_millis(100);

/// What a child is given at its start, beside what all of them are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prepared {
    /// Arguments after the others.
    pub arguments: Vec<String>,
    /// Variables of its environment; what must not stand on a command line.
    pub environment: Vec<(String, String)>,
}

/// Called before every start of a child; blocks, and says why there can be none now.
#[derive(Clone)]
pub struct Prepare(pub Arc<dyn Fn() -> Result<Prepared, String> + Send + Sync>);

impl std::fmt::Debug for Prepare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prepare")
    }
}

/// How the child is run and watched.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Its name in logs and metrics.
    pub group: String,
    /// Program and arguments.
    pub program: Vec<String>,
    /// What every start needs anew.
    pub prepare: Option<Prepare>,
    /// Time to load the model.
    pub start_within: Duration,
    /// Silence that is borne at least.
    pub silence_floor: Duration,
    /// Silence that is borne, in multiples of the predicted time.
    pub silence_factor: f64,
}

impl EngineOptions {
    /// Starts a child, and waits for its model.
    pub(super) fn start_child(&self, stop: &AtomicBool) -> Result<(Process, EngineInfo), String> {
        let Prepared { arguments, environment } = self.prepare.as_ref().map_or(Ok(Prepared::default()), |p| (p.0)())?;
        let program = [&self.program[..], &arguments].concat();
        Process::start(&program, &environment, self.start_within, self.silence_floor, stop)
    }
}

/// The engine behind its process.
pub struct SupervisedEngine {
    supervisor: Arc<Supervisor>,
    keeper: Option<JoinHandle<()>>,
}

impl SupervisedEngine {
    /// Starts the first child, and waits for its model.
    pub(super) fn start(
        options: EngineOptions,
        health: Component,
        culprits: Arc<Mutex<Culprits>>,
    ) -> Result<Self, String> {
        let never = AtomicBool::new(false);
        let (process, info) = options.start_child(&never)?;
        info!(
            engine.group = options.group,
            engine.pid = process.id(),
            engine.model = info.model,
            engine.device = info.device,
            engine.concurrency = info.concurrency,
            "the engine is ready"
        );
        let supervisor = Arc::new(Supervisor::new(options, process, info, health, culprits));
        let kept = supervisor.clone();
        let keeper = thread::Builder::new().name("apbd-engine-keeper".to_owned()).spawn(move || keeper::keep(&kept));
        let keeper = keeper.map_err(|error| format!("its keeper's thread could not be started: {error}"))?;
        Ok(Self { supervisor, keeper: Some(keeper) })
    }

    /// Requests that could be brought now without waiting.
    pub(super) fn room(&self) -> usize {
        self.supervisor.state().room()
    }

    /// Whether it can be had.
    pub(super) fn outlook(&self) -> Outlook {
        self.supervisor.state().outlook()
    }

    /// How it would run a request, and the memory that takes.
    pub(super) fn offer(&self, request: &InferRequest) -> Result<(PrefillPlan, Option<Demand>), EngineError> {
        let (context, query, query_at) = (request.context.len(), request.query.len(), request.query_at);
        let (attention, new_tokens) = (request.attention.clone(), request.generation.max_new_tokens);
        self.supervisor.plan(|id| Ask::Plan { id, context, query, query_at, attention, new_tokens })
    }
}

impl Drop for SupervisedEngine {
    fn drop(&mut self) {
        self.supervisor.stop.store(true, Ordering::Relaxed);
        self.supervisor.notify();
        if let Some(keeper) = self.keeper.take() {
            // That it panicked has been printed by the thread itself.
            let _ = keeper.join();
        }
    }
}

/// How a try of a request ended.
enum Ending {
    /// The child has answered.
    Answered(Result<Box<InferOutcome>, EngineError>),
    /// The child has failed, or is given up; `is_mine`: surely by this request's doing.
    Failed { kind: &'static str, error: EngineError, is_mine: bool },
    /// The child has not begun it, or had to leave it through nobody's fault, and will do nothing any more.
    Untouched { reason: String },
}

/// A request's place among the others, from its coming to its end.
struct Seat<'a> {
    supervisor: &'a Supervisor,
    id: u64,
    fingerprint: Fingerprint,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.supervisor.state().flights.leave(self.id);
        self.supervisor.notify();
    }
}

impl<'a> Seat<'a> {
    fn take(supervisor: &'a Supervisor, request: &InferRequest) -> Self {
        let fingerprint = Fingerprint::of(request);
        let is_known = supervisor.culprits().knows(fingerprint);
        let mut state = supervisor.state();
        let (id, budget) = (state.new_id(), state.budget(request.context.len(), &supervisor.options));
        state.flights.enter(id, is_known, budget);
        Self { supervisor, id, fingerprint }
    }

    /// Waits for the request's turn; the child to run it in.
    fn turn(&self, observer: Observer<'_>) -> Result<Arc<Process>, EngineError> {
        loop {
            {
                let mut state = self.supervisor.state();
                if let Some(refusal) = state.refusal(self.id) {
                    return Err(refusal);
                }
                if let Some(process) = state.start(self.id) {
                    return Ok(process);
                }
                drop(self.supervisor.wait(state, TICK));
            }
            if !observer(Progress::Waiting) {
                return Err(EngineError::Cancelled);
            }
        }
    }

    fn run(&self, process: &Process, request: &InferRequest, observer: Observer<'_>) -> Ending {
        let call = process.call(self.id);
        if !process.say(&Ask::Infer { id: self.id, request: Box::new(request.clone()) }) {
            return Ending::Untouched { reason: "it does not listen".to_owned() };
        }
        let mut watch = Watch::new(self, process);
        let mut last = Progress::Prefill { layers_done: 0, layers: 0 };
        loop {
            match call.answers.recv_timeout(TICK) {
                Ok(Answer::Done { result, .. }) => return watch.ending(result),
                Ok(Answer::Progress { progress, .. }) => {
                    last = progress;
                    watch.moved(progress);
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let error = EngineError::Crashed { reason: process.ending() };
                    return Ending::Failed { kind: "crashed", error, is_mine: false };
                }
            }
            if let Some(failed) = watch.look() {
                return failed;
            }
            if !observer(last) {
                watch.cancel();
            }
        }
    }

    /// What the end of its child means for this request.
    fn fate(&self, process: &Arc<Process>, kind: &'static str, reason: &str, is_mine: bool) -> Fate {
        self.supervisor.give_up(process, kind, reason, is_mine.then_some(self.id));
        // One that is in no child's end has met one that was given up before it came.
        self.supervisor.state().flights.fate(self.id).unwrap_or(Fate::Released)
    }
}

/// Watches over one request in a child.
struct Watch<'a> {
    seat: &'a Seat<'a>,
    process: &'a Process,
    looked_at: Instant,
    moved_at: Instant,
    /// How long it may stand still, by who was in the child when it last moved.
    patience: Option<Duration>,
    /// Whether it was told to end, and when that was if it is because it stands still.
    cancelled: bool,
    stopped_at: Option<(Instant, Duration)>,
}

impl<'a> Watch<'a> {
    fn new(seat: &'a Seat<'a>, process: &'a Process) -> Self {
        let now = Instant::now();
        Self { seat, process, looked_at: now, moved_at: now, patience: None, cancelled: false, stopped_at: None }
    }

    fn moved(&mut self, progress: Progress) {
        if progress != Progress::Waiting {
            (self.moved_at, self.patience) = (Instant::now(), None);
        }
    }

    /// An answer that says that the child is not to be trusted any more is the end of the child.
    fn ending(&self, result: Result<Box<InferOutcome>, EngineError>) -> Ending {
        match (result, self.stopped_at) {
            (Err(error @ EngineError::Crashed { .. }), _) => Ending::Failed { kind: "crashed", error, is_mine: true },
            // A poisoned device fails whoever comes next to it.
            (Err(error @ EngineError::Device { .. }), _) => Ending::Failed { kind: "device", error, is_mine: false },
            // Something ended before this request was begun: another one, or another node. Or that node was told to stop.
            (Err(EngineError::Unavailable { reason }), _) => Ending::Untouched { reason },
            (Err(EngineError::Cancelled), Some((_, stood_still))) => {
                Ending::Answered(Err(EngineError::Hung { seconds: stood_still.as_secs() }))
            }
            (result, _) => Ending::Answered(result),
        }
    }

    fn cancel(&mut self) {
        if !self.cancelled {
            self.cancelled = self.process.say(&Ask::Cancel { id: self.seat.id });
        }
    }

    /// The child that says nothing at all is given up, whoever is to blame. A request that stands still while others go on is told to end, and
    /// if it does not, the child ends by its doing. It may have to wait for each of the others, as long as that one may be silent: from then
    /// on nothing but a fault keeps it from moving.
    fn look(&mut self) -> Option<Ending> {
        if self.looked_at.elapsed() < TICK {
            return None;
        }
        self.looked_at = Instant::now();
        let supervisor = self.seat.supervisor;
        let (silence, patience) = {
            let state = supervisor.state();
            (state.flights.silence(), *self.patience.get_or_insert_with(|| state.flights.patience()))
        };
        let hung = |budget: Duration, is_mine| {
            let error = EngineError::Hung { seconds: budget.as_secs() };
            Some(Ending::Failed { kind: "hung", error, is_mine })
        };
        if !silence.is_zero() && self.process.silent_for() >= silence {
            return hung(silence, false);
        }
        match self.stopped_at {
            Some((at, stood_still)) if at.elapsed() >= supervisor.options.silence_floor => hung(stood_still, true),
            None if self.moved_at.elapsed() >= patience => {
                self.stopped_at = Some((Instant::now(), patience));
                self.cancel();
                None
            }
            _ => None,
        }
    }
}

impl Supervisor {
    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let seat = Seat::take(self, request);
        let mut was_untouched = false;
        loop {
            let process = seat.turn(observer)?;
            match seat.run(&process, request, observer) {
                Ending::Answered(Ok(outcome)) => {
                    self.culprits().forget(seat.fingerprint);
                    let mut state = self.state();
                    state.breaker.succeeded();
                    state.measured(request.context.len(), outcome.prefill);
                    return Ok(*outcome);
                }
                Ending::Answered(Err(error)) => return Err(error),
                Ending::Failed { kind, error, is_mine } => {
                    match seat.fate(&process, kind, &error.to_string(), is_mine) {
                        Fate::Suspected => {}
                        Fate::Released => {
                            let reason = "it ended under another request".to_owned();
                            return Err(EngineError::Unavailable { reason });
                        }
                        Fate::Caught => {
                            self.culprits().add(seat.fingerprint);
                            return Err(error);
                        }
                    }
                }
                // A child may have died since the last request: that is not this one's doing.
                Ending::Untouched { reason } => {
                    self.state().flights.set_running(seat.id, false);
                    self.give_up(&process, "died_idle", &reason, None);
                    if std::mem::replace(&mut was_untouched, true) {
                        return Err(EngineError::Unavailable { reason });
                    }
                }
            }
        }
    }

    /// Asks the child for a plan, beside whatever it is at.
    fn plan(&self, ask: impl FnOnce(u64) -> Ask) -> Result<(PrefillPlan, Option<Demand>), EngineError> {
        let (id, process) = {
            let mut state = self.state();
            (state.new_id(), state.process().cloned())
        };
        let Some(process) = process else {
            return Err(EngineError::Unavailable { reason: "it is being started".to_owned() });
        };
        let call = process.call(id);
        let failed = match process.say(&ask(id)).then(|| call.answers.recv_timeout(self.options.silence_floor)) {
            Some(Ok(Answer::Planned { result: Err(EngineError::Crashed { reason }), .. })) => reason,
            Some(Ok(Answer::Planned { result, demand, .. })) => return result.map(|plan| (*plan, demand)),
            Some(Err(RecvTimeoutError::Disconnected)) => process.ending(),
            Some(Ok(_) | Err(RecvTimeoutError::Timeout)) => "it gives no plan".to_owned(),
            None => "it does not listen".to_owned(),
        };
        // Where all else goes on, it is the plan: nobody else is to blame then.
        let is_mine = !process.has_ended() && process.silent_for() < self.options.silence_floor;
        self.give_up(&process, "crashed", &failed, is_mine.then_some(id));
        Err(EngineError::Crashed { reason: failed })
    }
}

impl Engine for SupervisedEngine {
    fn info(&self) -> EngineInfo {
        self.supervisor.info.clone()
    }

    fn is_ready(&self) -> bool {
        self.supervisor.state().process().is_some()
    }

    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        attention: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        let attention = attention.clone();
        let ask = |id| Ask::Plan { id, context, query, query_at, attention, new_tokens: 0 };
        self.supervisor.plan(ask).map(|(plan, _)| plan)
    }

    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        self.supervisor.infer(request, observer)
    }
}
