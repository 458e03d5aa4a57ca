//! The second hand: the threads that call the engine, which blocks each of them for as long as an inference takes.
//!
//! Invariant: as many threads as the engine takes requests at a time; a panic of the engine costs the job that met it, not the thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Parts;
use super::events::{Event, EventSink};
use super::shutdown::{Phase, Shutdown};
use super::work::{Interrupt, Work};
use crate::engine::{EngineError, InferOutcome, InferRequest, Progress};
use crate::failpoint;
use crate::job::{ErrorCode, JobError, Stage};
use crate::store::JobProgress;

/// A job whose prompt is made.
pub(super) struct Ready {
    work: Work,
    request: InferRequest,
    since: Instant,
}

impl Ready {
    pub fn new(work: Work, request: InferRequest) -> Self {
        Self { work, request, since: Instant::now() }
    }
}

/// A job at the end of its attempt.
pub(super) struct Ended {
    pub work: Work,
    pub result: Result<InferOutcome, JobError>,
}

/// What the engine's threads share.
struct Desk {
    parts: Parts,
    requests: Mutex<mpsc::Receiver<Ready>>,
    ended: mpsc::Sender<Ended>,
    shutdown: Shutdown,
}

/// Starts so many threads. They end when `requests` is closed and empty.
pub(super) fn spawn(
    at_once: usize,
    parts: Parts,
    requests: mpsc::Receiver<Ready>,
    ended: mpsc::Sender<Ended>,
    shutdown: Shutdown,
) -> io::Result<Vec<JoinHandle<()>>> {
    let desk = Arc::new(Desk { parts, requests: Mutex::new(requests), ended, shutdown });
    let start = |number| {
        let desk = desk.clone();
        thread::Builder::new().name(format!("apbd-engine-{number}")).spawn(move || desk.infer_all())
    };
    (0..at_once).map(start).collect()
}

impl Desk {
    fn infer_all(&self) {
        loop {
            // Held while there is nothing to do; never while something is done.
            let next = self.requests.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
            let Some(Ready { mut work, request, since }) = next else { return };
            // Waiting for the engine is waiting, as before the claim.
            work.spent(Stage::Queue, since.elapsed());
            if self.shutdown.phase() != Phase::Working {
                work.held.interrupt(Interrupt::Shutdown);
            }
            failpoint::reach("engine.asked");
            let result = work.check().and_then(|()| infer(&self.parts, &self.shutdown, &mut work, &request));
            failpoint::reach("engine.answered");
            if self.ended.blocking_send(Ended { work, result }).is_err() {
                return;
            }
        }
    }
}

fn infer(
    parts: &Parts,
    shutdown: &Shutdown,
    work: &mut Work,
    request: &InferRequest,
) -> Result<InferOutcome, JobError> {
    let asked = Instant::now();
    let begun = Mutex::new(None);
    let called = {
        let observer = observer(&parts.events, shutdown, work, &begun);
        catch_unwind(AssertUnwindSafe(|| parts.engine.infer(request, &observer)))
    };
    let spent = asked.elapsed();
    // An engine that tells of no wait has begun at once.
    let begun = begun.into_inner().unwrap_or_else(PoisonError::into_inner);
    let waited = begun.map_or(Duration::ZERO, |begun: Instant| begun - asked);
    work.spent(Stage::Queue, waited);
    match called {
        Ok(Ok(outcome)) => {
            work.spent(Stage::Prefill, outcome.prefill);
            work.spent(Stage::Generate, outcome.generate);
            Ok(outcome)
        }
        Ok(Err(error)) => {
            // How far it came is not known: all of it counts as prefill.
            work.spent(Stage::Prefill, spent - waited);
            Err(job_error(&error, work))
        }
        Err(_) => {
            work.spent(Stage::Prefill, spent - waited);
            Err(JobError::new(ErrorCode::Internal, "the engine panicked; its message is in the log"))
        }
    }
}

/// Tells of the progress and says whether to go on. What still waits at the drain is not begun any more.
fn observer<'a>(
    events: &'a Arc<dyn EventSink>,
    shutdown: &'a Shutdown,
    work: &'a Work,
    begun: &'a Mutex<Option<Instant>>,
) -> impl Fn(Progress) -> bool + Sync + 'a {
    let (job, held) = (work.claim.job.id, work.held.clone());
    let waits = AtomicBool::new(false);
    move |progress| {
        let (stage, done, total) = match progress {
            Progress::Waiting => {
                waits.store(true, Ordering::Relaxed);
                if shutdown.phase() != Phase::Working {
                    held.interrupt(Interrupt::Shutdown);
                }
                (Stage::Queue, 0, 0)
            }
            Progress::Prefill { layers_done, layers } => (Stage::Prefill, layers_done, layers),
            Progress::Generate { tokens, at_most } => (Stage::Generate, tokens, at_most),
        };
        if stage != Stage::Queue && waits.swap(false, Ordering::Relaxed) {
            *begun.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        failpoint::reach("engine.progressed");
        held.progressed(JobProgress { stage, done: done as u64, total: total as u64 });
        events.event(Event::Progressed { job, progress });
        held.interrupted().is_none()
    }
}

fn job_error(error: &EngineError, work: &Work) -> JobError {
    let code = match error {
        EngineError::Cancelled => {
            let why = work.held.interrupted().unwrap_or(Interrupt::Shutdown);
            return why.error();
        }
        EngineError::Input { .. } => ErrorCode::MessageInvalid,
        EngineError::Schema { .. } => ErrorCode::SchemaUnsupported,
        EngineError::Memory { .. } => ErrorCode::MemoryTooSmall,
        EngineError::Model { .. } => ErrorCode::ModelFailed,
        EngineError::Device { .. } => ErrorCode::DeviceFailed,
        EngineError::Crashed { .. } => ErrorCode::EngineCrashed,
        EngineError::Hung { .. } => ErrorCode::EngineHung,
        EngineError::Unavailable { .. } | EngineError::Busy { .. } => ErrorCode::EngineUnavailable,
    };
    let retry_after = match error {
        EngineError::Busy { seconds } => Some(Duration::from_secs(*seconds)),
        _ => None,
    };
    JobError { retry_after, ..JobError::new(code, error.to_string()) }
}
