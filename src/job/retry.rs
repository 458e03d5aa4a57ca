//! When a job is tried again: from the error, the failures so far and the policy to a [`Verdict`].
//!
//! Failures of the surroundings (class `infra`) are counted apart from those the document may have caused (an engine or
//! a worker that died under it): an outage of an hour must not quarantine what waits for its end, and a document that
//! kills every engine must not get as many as an outage does.
//!
//! Invariant: pure; the jitter is drawn from the job's id and its attempt, so a verdict can be computed again.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use super::ids::{Attempt, JobId};
use super::outcome::{Disposition, ErrorClass, ErrorCode, JobError};

/// Which of a job's two counters an attempt raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureCounter {
    /// Failures the document may have caused: at `max_attempts` the job is quarantined.
    Suspect,
    /// Failures of the surroundings: at `max_infra_failures` the job fails.
    Infra,
}

/// What a job has met so far, since it was enqueued or replayed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// Failures the document may have caused.
    pub suspect: u32,
    /// Failures of the surroundings.
    pub infra: u32,
}

/// Exponential back-off with jitter: the `n`th wait is drawn from the upper half of `first * 2^(n-1)`, at most `cap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// First wait.
    pub first: Duration,
    /// Longest wait.
    pub cap: Duration,
}

impl Backoff {
    /// The wait after failure `failures` (from 1).
    pub fn wait(&self, failures: u32, job: JobId, attempt: Attempt) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let whole = self.first.saturating_mul(1 << doublings).min(self.cap);
        let (high, low) = job.uuid().as_u64_pair();
        let seed = high ^ low.rotate_left(32) ^ u64::from(attempt.get());
        whole.mul_f64(StdRng::seed_from_u64(seed).random_range(0.5..=1.0))
    }
}

/// How often and when a job is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Suspect failures after which a job is quarantined.
    pub max_attempts: u32,
    /// Failures of the surroundings after which a job fails.
    pub max_infra_failures: u32,
    /// Waits after an `infra` error.
    pub infra: Backoff,
    /// Waits after a `gpu` error.
    pub gpu: Backoff,
    /// Waits after an `internal` error.
    pub internal: Backoff,
}

impl Default for RetryPolicy {
    /// Twelve infra failures span about an hour and a half; three suspect ones a minute.
    fn default() -> Self {
        let backoff = |first, cap| Backoff { first: Duration::from_secs(first), cap: Duration::from_secs(cap) };
        Self {
            max_attempts: 3,
            max_infra_failures: 12,
            infra: backoff(5, 900),
            gpu: backoff(10, 300),
            internal: backoff(15, 600),
        }
    }
}

impl RetryPolicy {
    /// For one process with its documents on the same machine: nothing is worth a long wait, and a document is given up only
    /// after ten deaths of the process, since a person who kills it is likelier than a document that does.
    pub fn local() -> Self {
        let backoff = |first, cap| Backoff { first: Duration::from_millis(first), cap: Duration::from_millis(cap) };
        Self {
            max_attempts: 10,
            max_infra_failures: 3,
            infra: backoff(200, 2000),
            gpu: backoff(500, 5000),
            internal: backoff(200, 2000),
        }
    }

    /// What becomes of `job` after `attempt` ended in `error`, where `before` is what it had met before that attempt.
    pub fn verdict(&self, job: JobId, attempt: Attempt, before: Failures, error: &JobError) -> Verdict {
        match error.disposition() {
            Disposition::Fail if error.code == ErrorCode::Cancelled => Verdict::Cancelled,
            Disposition::Fail => Verdict::Fail,
            Disposition::Requeue => Verdict::Requeue { after: requeue_wait(error) },
            Disposition::RetryAfter | Disposition::EngineFatal => self.retry(job, attempt, before, error),
        }
    }

    fn retry(&self, job: JobId, attempt: Attempt, before: Failures, error: &JobError) -> Verdict {
        let (counter, failures, backoff) = match error.class() {
            ErrorClass::Infra => (FailureCounter::Infra, before.infra + 1, self.infra),
            ErrorClass::Gpu => (FailureCounter::Suspect, before.suspect + 1, self.gpu),
            _ => (FailureCounter::Suspect, before.suspect + 1, self.internal),
        };
        match counter {
            FailureCounter::Suspect if failures >= self.max_attempts => Verdict::Quarantine,
            FailureCounter::Infra if failures >= self.max_infra_failures => Verdict::Fail,
            counter => {
                let asked = error.retry_after.unwrap_or_default().min(backoff.cap);
                Verdict::Retry { after: backoff.wait(failures, job, attempt).max(asked), counter }
            }
        }
    }
}

/// A job that is handed back by a stopping worker can start elsewhere at once; one that no engine took would only spin.
fn requeue_wait(error: &JobError) -> Duration {
    match error.code {
        ErrorCode::Shutdown | ErrorCode::LeaseLost => Duration::ZERO,
        _ => error.retry_after.unwrap_or(Duration::from_secs(1)),
    }
}

/// What becomes of a job after an attempt that gave no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It ends as failed.
    Fail,
    /// It ends as cancelled.
    Cancelled,
    /// It ends as dead: it failed too often in ways that hurt others. Only a person replays it.
    Quarantine,
    /// It is queued again, not before `after` has passed, and the failure is counted.
    Retry {
        /// Wait.
        after: Duration,
        /// Where it is counted.
        counter: FailureCounter,
    },
    /// It is queued again, and nothing is counted.
    Requeue {
        /// Wait.
        after: Duration,
    },
}
