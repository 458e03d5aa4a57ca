//! What each error means for the job that met it, from the first attempt to the last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use apbd::job::retry::{Backoff, FailureCounter, Failures, RetryPolicy};
use apbd::job::{Disposition, ErrorClass, ErrorCode, JobError, JobId};
use apbd::store::{AttemptReport, Claim, ClaimRequest, Ending, JobState, Store};
use futures_util::future::join_all;

use crate::suite::{Fresh, add, message, request};

/// What becomes of a job that meets one error again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It ends so at once, and no counter is raised.
    Ends(JobState),
    /// It is tried again until the counter is full, and ends so.
    TriedAgain(FailureCounter, JobState),
    /// It is queued again for ever, and no counter is raised.
    HandedBack,
}

/// What is promised of each error: who has to act, and what becomes of the job. A new code does not compile without its row.
fn promised(code: ErrorCode) -> (ErrorClass, Fate) {
    use ErrorClass::{Gpu, Infra, Input, Internal, Model, Policy};
    let fails = Fate::Ends(JobState::Failed);
    let suspect = Fate::TriedAgain(FailureCounter::Suspect, JobState::Dead);
    let infra = Fate::TriedAgain(FailureCounter::Infra, JobState::Failed);
    match code {
        ErrorCode::MessageInvalid => (Input, fails),
        ErrorCode::MessageTooLarge => (Input, fails),
        ErrorCode::PayloadConflict => (Input, fails),
        ErrorCode::DocumentNotFound => (Input, fails),
        ErrorCode::DocumentForbidden => (Input, fails),
        ErrorCode::DocumentEmpty => (Input, fails),
        ErrorCode::DocumentNotText => (Input, fails),
        ErrorCode::MediaTypeUnsupported => (Input, fails),
        ErrorCode::DocumentCorrupt => (Input, fails),
        ErrorCode::DocumentEncrypted => (Input, fails),
        ErrorCode::DocumentTooLarge => (Input, fails),
        ErrorCode::SourceChanged => (Input, fails),
        ErrorCode::TemplateUnknown => (Input, fails),
        ErrorCode::SchemaUnsupported => (Input, fails),
        ErrorCode::ContextTooLong => (Policy, fails),
        ErrorCode::MemoryTooSmall => (Policy, fails),
        ErrorCode::ModelUnknown => (Policy, fails),
        ErrorCode::LocationNotAllowed => (Policy, fails),
        ErrorCode::ReplyNotAllowed => (Policy, fails),
        ErrorCode::DeadlineExceeded => (Policy, fails),
        ErrorCode::Cancelled => (Policy, Fate::Ends(JobState::Cancelled)),
        ErrorCode::ModelFailed => (Model, fails),
        ErrorCode::DeviceFailed => (Gpu, suspect),
        ErrorCode::EngineCrashed => (Gpu, suspect),
        ErrorCode::EngineHung => (Gpu, suspect),
        ErrorCode::DeviceOutOfMemory => (Gpu, suspect),
        ErrorCode::EngineUnavailable => (Gpu, Fate::HandedBack),
        ErrorCode::FetchFailed => (Infra, infra),
        ErrorCode::FetchTimedOut => (Infra, infra),
        ErrorCode::FetchRefused => (Infra, infra),
        ErrorCode::OutputFailed => (Infra, infra),
        ErrorCode::StoreUnavailable => (Infra, Fate::HandedBack),
        ErrorCode::Shutdown => (Infra, Fate::HandedBack),
        ErrorCode::LeaseLost => (Infra, Fate::HandedBack),
        ErrorCode::WorkerDied => (Internal, suspect),
        ErrorCode::Internal => (Internal, suspect),
    }
}

const SUSPECT_AT_MOST: u32 = 3;
const INFRA_AT_MOST: u32 = 4;
/// Attempts after which a job that is handed back each time is believed to go on for ever.
const HANDED_BACK: u32 = 5;

fn policy() -> RetryPolicy {
    let wait = Backoff { first: Duration::from_millis(1), cap: Duration::from_millis(2) };
    RetryPolicy {
        max_attempts: SUSPECT_AT_MOST,
        max_infra_failures: INFRA_AT_MOST,
        infra: wait,
        gpu: wait,
        internal: wait,
    }
}

/// Attempts, failures and state at the end (or when it is believed to have none).
fn expected(fate: Fate) -> (u32, Failures, JobState) {
    let none = Failures::default();
    match fate {
        Fate::Ends(state) => (1, none, state),
        Fate::TriedAgain(FailureCounter::Suspect, state) => {
            (SUSPECT_AT_MOST, Failures { suspect: SUSPECT_AT_MOST, ..none }, state)
        }
        Fate::TriedAgain(FailureCounter::Infra, state) => {
            (INFRA_AT_MOST, Failures { infra: INFRA_AT_MOST, ..none }, state)
        }
        Fate::HandedBack => (HANDED_BACK, none, JobState::Queued),
    }
}

pub async fn every_error_has_the_fate_of_its_class(fresh: Fresh) {
    let store = &fresh.store;
    let met = join_all(ErrorCode::ALL.iter().map(|code| meet(store, *code))).await;
    for (code, (attempts, failures, state, outcome)) in ErrorCode::ALL.iter().zip(met) {
        let (class, fate) = promised(*code);
        assert_eq!(code.class(), class, "{code}");
        assert_eq!((attempts, failures, state), expected(fate), "{code}");
        let last = match fate {
            Fate::Ends(JobState::Cancelled) => "cancelled",
            Fate::HandedBack => "requeued",
            Fate::TriedAgain(FailureCounter::Suspect, _) => "quarantined",
            Fate::Ends(_) | Fate::TriedAgain(FailureCounter::Infra, _) => "failed",
        };
        assert_eq!(outcome, last, "{code}");
        let replaced = matches!(code, ErrorCode::DeviceFailed | ErrorCode::EngineCrashed | ErrorCode::EngineHung);
        assert_eq!(code.disposition() == Disposition::EngineFatal, replaced, "{code}: the engine");
    }
}

/// A job that meets `code` at every attempt: attempts, failures, state, and what is said of its last attempt.
async fn meet(store: &Arc<dyn Store>, code: ErrorCode) -> (u32, Failures, JobState, String) {
    let job = add(&**store, message("file:///a")).await;
    for attempt in 1..=HANDED_BACK {
        let claim = claimed(store, job).await;
        assert_eq!(claim.attempt.get(), attempt);
        let error = JobError::new(code, "as the test says");
        let verdict = policy().verdict(job, claim.attempt, claim.failures, &error);
        let ending = Ending::Errored { error, verdict };
        let report = AttemptReport { ending, stages: Default::default(), documents: Vec::new() };
        assert!(store.finish(&claim.lease(), &report).await.expect("finished"));
        if store.show(job).await.expect("shown").expect("there").summary.state.is_final() {
            break;
        }
    }
    let detail = store.show(job).await.expect("shown").expect("there");
    assert_eq!(detail.summary.error.expect("a reason").code, code);
    let last = detail.attempts.last().expect("an attempt");
    assert_eq!(last.error.as_ref().expect("a reason").code, code);
    (detail.summary.attempt.get(), detail.failures, detail.summary.state, last.outcome.clone())
}

/// The job, as soon as its wait is over.
async fn claimed(store: &Arc<dyn Store>, job: JobId) -> Claim {
    let start = Instant::now();
    loop {
        let asked = ClaimRequest { only: Some(vec![job]), ..request(1) };
        if let Some(claim) = store.claim(&asked).await.expect("claimed").pop() {
            return claim;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "it can not be claimed again");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
