//! What goes into the store and what comes out of it.
//!
//! Invariant: plain data; times that come out are the database's, durations were measured by it or by a worker's own clock.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::job::clean::{clean, clean_json, needs_cleaning};
use crate::job::retry::{FailureCounter, Failures, Verdict};
use crate::job::{
    Attempt, Digest, Disposition, DocumentFacts, ErrorCode, Job, JobError, JobId, JobResult, Priority, Stage,
    StageTimes, Task, TokenCount, WorkerId,
};

/// The way a job came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    /// A RabbitMQ queue.
    Amqp,
    /// A watched prefix or folder.
    DropFolder,
    /// Files named on a command line.
    Files,
    /// `apbd submit`.
    Submit,
}

/// Where the completion event of a job goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Queue named by the producer, checked against the allowed targets.
    pub target: String,
    /// The producer's own mark.
    pub correlation_id: Option<String>,
}

/// A job to take in.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// The job.
    pub job: Job,
    /// How it came.
    pub door: Door,
    /// Queue, prefix or path it came from; for people.
    pub origin: String,
    /// Bytes of its documents, if known: among equals the smaller is claimed first.
    pub size_bytes: Option<u64>,
    /// Who wants to hear of its end.
    pub reply: Option<Reply>,
}

/// What came of taking a job in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// It is in.
    Inserted,
    /// It was in already, with the same payload.
    Duplicate {
        /// Where it is by now.
        state: JobState,
    },
    /// Another job with this id and another payload is in; this one was not taken.
    Conflict,
}

/// A message or an object that is no job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// How it came.
    pub door: Door,
    /// Queue, or URI of the object.
    pub origin: String,
    /// AMQP message id, or version of the object.
    pub message_id: Option<String>,
    /// Its job id, if it had a readable one.
    pub job_id: Option<JobId>,
    /// Why, for programs.
    pub code: ErrorCode,
    /// Why, for people.
    pub reason: String,
    /// Digest of its bytes (of its identity, for an object that was not read).
    pub digest: Digest,
    /// Its size.
    pub size_bytes: u64,
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Waits for a worker (perhaps also for the end of a back-off).
    Queued,
    /// A worker holds it.
    Running,
    /// It has a result.
    Succeeded,
    /// It ended without one.
    Failed,
    /// It hurt its workers too often, and waits for a person to replay it.
    Dead,
    /// Somebody cancelled it.
    Cancelled,
}

impl JobState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Dead, Self::Cancelled];

    /// Name in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens to it by itself.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for JobState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("'{text}' is not a state: {}", Self::ALL.map(Self::as_str).join(", "));
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(unknown)
    }
}

/// Which jobs a worker wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRequest {
    /// Who asks.
    pub worker: WorkerId,
    /// Jobs at most.
    pub limit: u32,
    /// How long they stay its own without a heartbeat.
    pub lease: Duration,
    /// Models it serves; a job that names none fits any. Empty: every model.
    pub models: Vec<String>,
    /// Jobs known to be larger than this are left for others.
    pub max_bytes: Option<u64>,
    /// Only these jobs, if given (one command's own files).
    pub only: Option<Vec<JobId>>,
}

/// A job as a worker holds it: what every write for it has to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The job.
    pub job: JobId,
    /// The fencing token.
    pub attempt: Attempt,
}

/// A claimed job.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The job.
    pub job: Job,
    /// Its fencing token.
    pub attempt: Attempt,
    /// What it had met before.
    pub failures: Failures,
    /// How long it waited since it was enqueued, or could be claimed again.
    pub queued_for: Duration,
}

impl Claim {
    /// What every write for it has to show.
    pub fn lease(&self) -> Lease {
        Lease { job: self.job.id, attempt: self.attempt }
    }
}

/// Where a running job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobProgress {
    /// Stage it is in.
    pub stage: Stage,
    /// Steps done of it (layers in `prefill`, tokens in `generate`, bytes in `fetch`).
    pub done: u64,
    /// Steps in all, 0 if unknown.
    pub total: u64,
}

/// A sign of life for one job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// The job as the worker holds it.
    pub lease: Lease,
    /// Where it is.
    pub progress: Option<JobProgress>,
}

/// What a heartbeat learns of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It is still the worker's.
    Held,
    /// It is still the worker's, and somebody wants it stopped: finish it as cancelled.
    CancelRequested,
    /// It is not the worker's any more: stop, write nothing.
    Lost,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// With a result.
    Succeeded(Box<JobResult>),
    /// Without one, and with what becomes of the job.
    Errored {
        /// Why.
        error: JobError,
        /// What now.
        verdict: Verdict,
    },
}

impl Ending {
    /// State of the job after it.
    pub fn state(&self) -> JobState {
        match self {
            Self::Succeeded(_) => JobState::Succeeded,
            Self::Errored { verdict, .. } => match verdict {
                Verdict::Fail => JobState::Failed,
                Verdict::Cancelled => JobState::Cancelled,
                Verdict::Quarantine => JobState::Dead,
                Verdict::Retry { .. } | Verdict::Requeue { .. } => JobState::Queued,
            },
        }
    }

    /// What the attempt's row says.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Succeeded(_) => "succeeded",
            Self::Errored { verdict, .. } => match verdict {
                Verdict::Fail => "failed",
                Verdict::Cancelled => "cancelled",
                Verdict::Quarantine => "quarantined",
                Verdict::Retry { .. } => "retried",
                Verdict::Requeue { .. } => "requeued",
            },
        }
    }

    /// The wait before the job can be claimed again, and where the failure is counted.
    pub fn consequences(&self) -> (Duration, Option<FailureCounter>) {
        match self {
            Self::Errored { verdict: Verdict::Retry { after, counter }, .. } => (*after, Some(*counter)),
            Self::Errored { verdict: Verdict::Requeue { after }, .. } => (*after, None),
            Self::Errored { verdict: Verdict::Quarantine, .. } => (Duration::ZERO, Some(FailureCounter::Suspect)),
            // The last of the failures that are borne.
            Self::Errored { verdict: Verdict::Fail, error } if error.disposition() == Disposition::RetryAfter => {
                (Duration::ZERO, Some(FailureCounter::Infra))
            }
            Self::Errored { .. } | Self::Succeeded(_) => (Duration::ZERO, None),
        }
    }

    /// Why there is no result.
    pub fn error(&self) -> Option<&JobError> {
        match self {
            Self::Succeeded(_) => None,
            Self::Errored { error, .. } => Some(error),
        }
    }

    /// The result.
    pub fn result(&self) -> Option<&JobResult> {
        match self {
            Self::Succeeded(result) => Some(result),
            Self::Errored { .. } => None,
        }
    }
}

/// Everything an attempt leaves behind.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptReport {
    /// How it ended.
    pub ending: Ending,
    /// Time of each stage it reached.
    pub stages: StageTimes,
    /// What was learned of each document, in the job's order; may be shorter than the job's list.
    pub documents: Vec<DocumentFacts>,
}

impl AttemptReport {
    /// The report without characters that a database can not hold; the result says so where it had some.
    pub(super) fn storable(&self) -> Self {
        let mut report = self.clone();
        if let Ending::Succeeded(result) = &mut report.ending {
            let text = needs_cleaning(&result.text);
            result.text = clean(&result.text).into_owned();
            let extraction = result.extraction.as_mut().is_some_and(clean_json);
            result.flags.text_cleaned |= text || extraction;
        }
        report
    }
}

/// What came of a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "state")]
pub enum CancelOutcome {
    /// It was queued, and is cancelled.
    Cancelled,
    /// It is running; its worker was asked to stop.
    Requested,
    /// It had ended before.
    AlreadyFinal(JobState),
    /// There is no such job.
    NotFound,
}

/// What to queue again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replay {
    /// These, where they are dead, failed or cancelled.
    Jobs(Vec<JobId>),
    /// Every dead one.
    Dead,
    /// Every failed one.
    Failed,
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Swept {
    /// Leases that had expired and whose jobs were queued again.
    pub requeued: u64,
    /// Jobs quarantined for it.
    pub quarantined: u64,
    /// Jobs whose deadline had passed.
    pub expired: u64,
    /// Jobs to be cancelled whose worker had gone.
    pub cancelled: u64,
}

/// How full the inbox is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct InboxDepth {
    /// Jobs that wait.
    pub queued: u64,
    /// Jobs that are held by workers.
    pub running: u64,
}

/// How long the oldest things wait, by the database's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Waits {
    /// Since the oldest waiting job could be claimed; none if none waits, or those that wait are backing off.
    pub job: Option<Duration>,
    /// Since the job ended whose completion event waits for the longest; of the 1,000 that are next.
    pub event: Option<Duration>,
    /// Completion events that were given up, counted up to 1,000.
    pub events_given_up: u64,
}

impl Waits {
    /// From seconds, as SQL gives them; a clock that went back is no wait.
    pub(super) fn of_seconds(job: Option<f64>, event: Option<f64>, events_given_up: i64) -> Self {
        let wait =
            |seconds: Option<f64>| seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default());
        Self { job: wait(job), event: wait(event), events_given_up: events_given_up.unsigned_abs() }
    }
}

/// A completion event to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxEvent {
    /// Stable over repetitions: receivers can tell a repeated event by it.
    pub event_id: uuid::Uuid,
    /// The job.
    pub job: JobId,
    /// Where to.
    pub reply: Reply,
    /// What to send.
    pub body: Value,
    /// How often it was taken before.
    pub tries: u32,
}

/// Which jobs to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFilter {
    /// Only these states; empty: all.
    pub states: Vec<JobState>,
    /// Only these jobs.
    pub only: Option<Vec<JobId>>,
    /// Rows at most.
    pub limit: u32,
}

/// A job in one line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobSummary {
    /// Identity.
    pub job_id: JobId,
    /// Where it is in its life.
    pub state: JobState,
    /// What it does.
    pub task: Task,
    /// URI of its first document.
    pub document: String,
    /// Model it asked for, or that served it.
    pub model: Option<String>,
    /// Urgency.
    pub priority: Priority,
    /// Claims so far.
    pub attempt: Attempt,
    /// When it was taken in.
    pub enqueued_at: DateTime<Utc>,
    /// When its last attempt began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// Why it ended or waits, where an error is the reason.
    pub error: Option<JobError>,
    /// Where it is, while it runs.
    pub progress: Option<JobProgress>,
    /// Tokens of context and query.
    pub tokens_in: Option<TokenCount>,
    /// Generated tokens.
    pub tokens_out: Option<TokenCount>,
}

/// One attempt at a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttemptRecord {
    /// Its number.
    pub attempt: Attempt,
    /// Who made it.
    pub worker: String,
    /// When it was claimed.
    pub started_at: DateTime<Utc>,
    /// When it ended; absent while it runs.
    pub ended_at: Option<DateTime<Utc>>,
    /// `running`, `succeeded`, `failed`, `cancelled`, `quarantined`, `retried`, `requeued` or `lost`.
    pub outcome: String,
    /// Why, where an error is the reason.
    pub error: Option<JobError>,
    /// Time of each stage.
    pub stages: StageTimes,
}

/// One document of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DocumentRecord {
    /// Where it is.
    pub uri: String,
    /// What is known of it.
    #[serde(flatten)]
    pub facts: DocumentFacts,
}

/// Everything about one job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobDetail {
    /// In short.
    #[serde(flatten)]
    pub summary: JobSummary,
    /// How it came.
    pub door: Door,
    /// From where.
    pub origin: String,
    /// Its message.
    pub message: crate::job::JobMessage,
    /// Its failures since it was enqueued or replayed.
    pub failures: Failures,
    /// Somebody wants it stopped.
    pub cancel_requested: bool,
    /// Its documents.
    pub documents: Vec<DocumentRecord>,
    /// Its attempts, the first one first.
    pub attempts: Vec<AttemptRecord>,
    /// Its result.
    pub result: Option<JobResult>,
}

/// A view for reports; the name in SQL is `report_` and this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReportView {
    /// One row a job.
    Jobs,
    /// Jobs and tokens by hour, task, model and state.
    ThroughputHourly,
    /// p50, p95 and p99 by stage, task and model.
    Latency,
    /// Failed and rejected by class and code.
    Failures,
    /// Tokens by task and model.
    Tokens,
    /// What waits and what runs.
    Backlog,
}

impl ReportView {
    /// Every view.
    pub const ALL: [Self; 6] =
        [Self::Backlog, Self::ThroughputHourly, Self::Latency, Self::Tokens, Self::Failures, Self::Jobs];

    /// Name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::ThroughputHourly => "throughput_hourly",
            Self::Latency => "latency",
            Self::Failures => "failures",
            Self::Tokens => "tokens",
            Self::Backlog => "backlog",
        }
    }
}

impl std::str::FromStr for ReportView {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("report_").unwrap_or(text);
        let unknown = || format!("'{text}' is not a report: {}", Self::ALL.map(Self::as_str).join(", "));
        Self::ALL.into_iter().find(|view| view.as_str() == name).ok_or_else(unknown)
    }
}

/// Rows of a report view.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReportTable {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// One list of values a row, in the columns' order.
    pub rows: Vec<Vec<Value>>,
}

/// The name a unit variant has in JSON, and in the database.
pub(super) fn name_of(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(name)) => name,
        other => unreachable!("a variant without fields is a string, not {other:?}"),
    }
}
