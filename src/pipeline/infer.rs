//! The second hand: the one thread that calls the engine, which blocks it for as long as an inference takes.
//!
//! Invariant: a panic of the engine costs the job that met it, not the thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

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

/// Starts the thread. It ends when `requests` is closed and empty.
pub(super) fn spawn(
    parts: Parts,
    mut requests: mpsc::Receiver<Ready>,
    ended: mpsc::Sender<Ended>,
    shutdown: Shutdown,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("apbd-engine".to_owned()).spawn(move || {
        while let Some(Ready { mut work, request, since }) = requests.blocking_recv() {
            // Waiting for the engine is waiting, as before the claim.
            work.spent(Stage::Queue, since.elapsed());
            if shutdown.phase() != Phase::Working {
                work.held.interrupt(Interrupt::Shutdown);
            }
            failpoint::reach("engine.asked");
            let result = work.check().and_then(|()| infer(&parts, &mut work, &request));
            failpoint::reach("engine.answered");
            if ended.blocking_send(Ended { work, result }).is_err() {
                return;
            }
        }
    })
}

fn infer(parts: &Parts, work: &mut Work, request: &InferRequest) -> Result<InferOutcome, JobError> {
    let began = Instant::now();
    let called = {
        let observer = observer(&parts.events, work);
        catch_unwind(AssertUnwindSafe(|| parts.engine.infer(request, &observer)))
    };
    match called {
        Ok(Ok(outcome)) => {
            work.spent(Stage::Prefill, outcome.prefill);
            work.spent(Stage::Generate, outcome.generate);
            Ok(outcome)
        }
        Ok(Err(error)) => {
            // How far it came is not known: all of it counts as prefill.
            work.spent(Stage::Prefill, began.elapsed());
            Err(job_error(&error, work))
        }
        Err(_) => {
            work.spent(Stage::Prefill, began.elapsed());
            Err(JobError::new(ErrorCode::Internal, "the engine panicked; its message is in the log"))
        }
    }
}

/// Tells of the progress and says whether to go on.
fn observer<'a>(events: &'a Arc<dyn EventSink>, work: &'a Work) -> impl Fn(Progress) -> bool + Sync + 'a {
    let (job, held) = (work.claim.job.id, work.held.clone());
    move |progress| {
        let (stage, done, total) = match progress {
            Progress::Prefill { layers_done, layers } => (Stage::Prefill, layers_done, layers),
            Progress::Generate { tokens, at_most } => (Stage::Generate, tokens, at_most),
        };
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
        EngineError::Unavailable { .. } => ErrorCode::EngineUnavailable,
    };
    JobError::new(code, error.to_string())
}
