//! The store: the durable inbox, claims and leases, results, and the outbox. PostgreSQL or SQLite behind one trait.
//!
//! The way of a job: a door [enqueues](Store::enqueue) it, a worker [claims](Store::claim) it, renews its lease by
//! [heartbeats](Store::heartbeat) and [finishes](Store::finish) the attempt with what came of it. Every claim raises the job's
//! [`Attempt`]; every write of a worker carries the attempt it was given, and changes nothing if that is not the job's
//! attempt any more. Leases run on the database's clock alone.
//!
//! Invariant: all SQL is below this module; a method that returned `Ok` has committed, one that returned `Err` has changed
//! nothing or (connection lost in commit) can be repeated as it is.

pub mod costs;
pub mod drops;
pub mod error;
mod event;
pub mod exports;
mod finish;
pub mod forget;
pub mod meeting;
mod postgres;
pub mod records;
mod sqlite;
pub mod url;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::job::retry::RetryPolicy;
use crate::job::{JobId, WorkerId};

pub use costs::CostStore;
pub use drops::{DropFate, DropFile, DropMark, DropSighting, DropStore, EndedFile, ReadyFiles};
pub use error::StoreError;
pub use exports::{Export, ExportStore};
pub use forget::{ForgetStore, Forgotten};
pub use meeting::MeetingStore;
pub use postgres::{Migrated, Roles, migrate};
use records::name_of;
pub use records::*;
pub use url::StoreUrl;

/// What a process wants of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To work: claim and finish jobs. A SQLite file has one worker at a time; opening it as such creates and migrates it, and
    /// queues again at once what a dead worker held. A PostgreSQL schema must have been migrated.
    Worker,
    /// To look, enqueue and cancel. The schema must be there.
    Client,
}

/// Opens the store at `url`. `retry` decides when jobs whose worker died are given up.
pub async fn open(url: &StoreUrl, access: Access, retry: RetryPolicy) -> Result<Arc<dyn Store>, StoreError> {
    match url {
        StoreUrl::Sqlite(path) => Ok(Arc::new(sqlite::SqliteStore::open(path, access, retry).await?)),
        StoreUrl::Postgres(_) => Ok(Arc::new(postgres::PostgresStore::open(url, access, retry).await?)),
    }
}

/// The durable state of all jobs. Methods are not cancel-safe: run them to their end.
#[async_trait]
pub trait Store: DropStore + ExportStore + CostStore + MeetingStore + ForgetStore {
    /// Takes jobs in, all in one transaction; one answer a job, in order. Repeating it is a no-op.
    async fn enqueue(&self, jobs: &[NewJob]) -> Result<Vec<Enqueued>, StoreError>;

    /// Leaves a row for a message or object that is no job. A repetition (same door, source, message id and digest) adds none.
    async fn reject(&self, rejection: &Rejection) -> Result<(), StoreError>;

    /// Gives `request.worker` up to `request.limit` jobs: the highest priority first, then the nearest deadline, then the
    /// smallest, then the oldest. The attempt and the lease are committed when this returns; two claims never return the same job.
    /// Jobs whose deadline has passed are not returned.
    async fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claim>, StoreError>;

    /// Renews the leases of one worker and records where its jobs are; one answer a beat, in order.
    async fn heartbeat(
        &self,
        worker: &WorkerId,
        lease: Duration,
        beats: &[Beat],
    ) -> Result<Vec<LeaseState>, StoreError>;

    /// Ends an attempt: result, timing, facts of the documents, state of the job and its completion event, in one transaction.
    /// `false`: the attempt is not the job's attempt any more, and nothing was written.
    async fn finish(&self, lease: &Lease, report: &AttemptReport) -> Result<bool, StoreError>;

    /// Cancels a queued job at once; asks the worker of a running one to stop (it learns when it next asks).
    async fn cancel(&self, job: JobId) -> Result<CancelOutcome, StoreError>;

    /// Those of `held` that somebody wants cancelled. Reads only, by key: cheap enough to be asked several times a second.
    /// The one method that may be dropped before its end.
    async fn cancels(&self, held: &[Lease]) -> Result<Vec<Lease>, StoreError>;

    /// Queues dead or failed jobs again with clean counters. Returns how many.
    async fn replay(&self, what: &Replay) -> Result<u64, StoreError>;

    /// Takes care of what nobody holds any more: jobs with an expired lease are queued again (counted as a suspect failure;
    /// quarantined at the policy's `max_attempts`; cancelled if that was asked for), queued jobs past their deadline fail.
    /// Every worker calls it now and then.
    async fn sweep(&self) -> Result<Swept, StoreError>;

    /// Jobs queued, of one door or of all, and running, each counted up to `at_most` (an admission window needs no more).
    async fn inbox_depth(&self, door: Option<Door>, at_most: u64) -> Result<InboxDepth, StoreError>;

    /// How long the oldest job and the oldest completion event wait.
    async fn waits(&self) -> Result<Waits, StoreError>;

    /// Up to `limit` completion events that nobody else is sending, hidden from others for `lease`. They stay until confirmed.
    async fn outbox_take(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxEvent>, StoreError>;

    /// These events were sent and confirmed.
    async fn outbox_confirm(&self, events: &[uuid::Uuid]) -> Result<(), StoreError>;

    /// This event could not be delivered, with the reason: tried again after `after`, or given up (and kept for people) if `None`.
    async fn outbox_return(&self, event: uuid::Uuid, reason: &str, after: Option<Duration>) -> Result<(), StoreError>;

    /// Jobs in short, newest first.
    async fn list(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError>;

    /// Everything about one job.
    async fn show(&self, job: JobId) -> Result<Option<JobDetail>, StoreError>;

    /// Up to `limit` rows of a report view.
    async fn report(&self, view: ReportView, limit: u32) -> Result<ReportTable, StoreError>;

    /// Whether the database answers and has the schema of this program.
    async fn check(&self) -> Result<(), StoreError>;

    /// Closes the connections; unfinished calls end first.
    async fn close(&self);
}
