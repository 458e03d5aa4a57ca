//! The ranks of one inference as threads: started, named, joined; a failure of one ends all.
//!
//! Invariant: no thread outlives the call; a rank that fails or panics aborts the communicator, so that no other waits for it.

use std::thread::{Builder, scope};

use crate::backend::{Backend, BackendError};
use crate::comm::{Comm, CommError};

use super::EngineError;
use super::control::Driver;
use super::infer::{Job, Timing, infer};
use super::rank::{Rank, RankError};

/// Runs a job on all ranks, which are given in order. Blocks until every rank has ended.
pub fn run<B, C>(ranks: Vec<Rank<'_, B, C>>, job: &Job<'_>, driver: &mut dyn Driver) -> Result<Timing, EngineError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    if (job.context.len(), job.query.len()) != (job.plan.context, job.plan.query) {
        let (context, query) = (job.plan.context, job.plan.query);
        let reason = format!(
            "the plan is for {context} tokens of context and {query} of query, there are {} and {}",
            job.context.len(),
            job.query.len()
        );
        return Err(EngineError::Input { reason });
    }
    let mut driver = Some(driver);
    let outcomes = scope(|scope| {
        let mut threads = Vec::with_capacity(ranks.len());
        for rank in ranks {
            let driver = if rank.is_root() { driver.take() } else { None };
            let builder = Builder::new().name(format!("apbd-rank-{}", rank.comm.rank()));
            // A rank that could not be started is dropped with its end of the communicator, which ends the others.
            threads.push(builder.spawn_scoped(scope, move || guarded(rank, job, driver)));
        }
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    settle(outcomes, job)
}

/// How a rank ended.
type Outcome = Result<Timing, Failure>;

enum Failure {
    Rank(RankError),
    /// The thread could not start, or panicked.
    Thread(String),
}

fn guarded<B, C>(rank: Rank<'_, B, C>, job: &Job<'_>, driver: Option<&mut dyn Driver>) -> Result<Timing, RankError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    let mut guard = AbortOnPanic { abort: &|| rank.comm.abort("the rank panicked"), armed: true };
    let outcome = infer(&rank, job, driver);
    guard.armed = false;
    match &outcome {
        // On these the ranks have agreed.
        Ok(_) | Err(RankError::Cancelled | RankError::Driver(_)) => {}
        Err(error) => rank.comm.abort(&error.to_string()),
    }
    outcome
}

struct AbortOnPanic<'a> {
    abort: &'a dyn Fn(),
    armed: bool,
}

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if self.armed {
            (self.abort)();
        }
    }
}

type Thread<'scope> = std::io::Result<std::thread::ScopedJoinHandle<'scope, Result<Timing, RankError>>>;

fn join(thread: Thread<'_>) -> Outcome {
    let thread = thread.map_err(|error| Failure::Thread(format!("a rank's thread could not start: {error}")))?;
    let name = thread.thread().name().unwrap_or_default().to_owned();
    match thread.join() {
        Ok(outcome) => outcome.map_err(Failure::Rank),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Failure::Thread(format!("{name} panicked: {message}")))
        }
    }
}

/// The root's timing, or the error that came first: what other ranks say of it is only its echo.
fn settle(outcomes: Vec<Outcome>, job: &Job<'_>) -> Result<Timing, EngineError> {
    let echo = |failure: &Failure| matches!(failure, Failure::Rank(RankError::Comm(CommError::Aborted { .. })));
    let mut timing = None;
    let mut worst: Option<Failure> = None;
    for outcome in outcomes {
        match outcome {
            Ok(done) => timing = timing.or(Some(done)),
            Err(failure) if worst.as_ref().is_none_or(|known| echo(known) && !echo(&failure)) => worst = Some(failure),
            Err(_) => {}
        }
    }
    match (worst, timing) {
        (Some(Failure::Rank(error)), _) => Err(engine_error(error, job)),
        (Some(Failure::Thread(reason)), _) => Err(EngineError::Device { reason }),
        (None, Some(timing)) => Ok(timing),
        (None, None) => Err(EngineError::Device { reason: "the engine has no ranks".to_owned() }),
    }
}

fn engine_error(error: RankError, job: &Job<'_>) -> EngineError {
    match error {
        RankError::Cancelled => EngineError::Cancelled,
        RankError::Driver(error) => error,
        // Admission let it pass, the device did not: all that is known is what was missing.
        RankError::Backend(BackendError::OutOfMemory { bytes, .. }) => {
            EngineError::Memory { tokens: job.context.len(), needed_bytes: bytes as u64, available_bytes: 0 }
        }
        error => EngineError::Device { reason: error.to_string() },
    }
}
