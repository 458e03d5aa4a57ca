//! The store in PostgreSQL: what several daemons share.
//!
//! Claims take rows with `FOR UPDATE SKIP LOCKED`, so that workers never wait for each other. Heartbeats have connections of
//! their own: however busy the others are, a lease is renewed in time. A lost connection is replaced by the pool; the call
//! that lost it returns an error that says it may be repeated.
//!
//! Invariant: every time is the database's; no statement and no lock lasts longer than the server is told to allow.

mod costs;
mod drops;
mod error;
mod exports;
mod finish;
mod forget;
mod inbox;
mod look;
mod meeting;
mod migrate;
mod outbox;
mod rows;
mod work;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{Postgres, Transaction};

use super::finish::Finish;
use super::{
    Access, AttemptReport, Beat, CancelOutcome, Claim, ClaimRequest, Door, Enqueued, InboxDepth, JobDetail, JobFilter,
    JobSummary, Lease, LeaseState, NewJob, OutboxEvent, Rejection, Replay, ReportTable, ReportView, Store, StoreError,
    StoreUrl, Swept, Waits,
};
use crate::job::retry::RetryPolicy;
use crate::job::{JobId, WorkerId};

pub use migrate::{Migrated, Roles, migrate};

/// Connections for everything but heartbeats.
const CONNECTIONS: u32 = 12;
/// Connections for heartbeats alone.
const HEARTBEAT_CONNECTIONS: u32 = 2;
/// How long a call waits for a connection before it says that the database is not available.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// What the server ends by itself, so that a half-open connection holds no lock for long.
const SERVER_LIMITS: [(&str, &str); 4] = [
    ("statement_timeout", "30s"),
    ("lock_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "60s"),
    ("tcp_user_timeout", "30s"),
];

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("migrations/postgres");

/// A store in a PostgreSQL database.
pub struct PostgresStore {
    pool: PgPool,
    heartbeats: PgPool,
    place: String,
    retry: RetryPolicy,
}

impl PostgresStore {
    /// Connects to the database of `url`, whose schema must be that of this program.
    pub async fn open(url: &StoreUrl, access: Access, retry: RetryPolicy) -> Result<Self, StoreError> {
        let options = connect_options(url)?;
        let most = match access {
            Access::Worker => CONNECTIONS,
            Access::Client => 2,
        };
        let pool = |most| PgPoolOptions::new().max_connections(most).acquire_timeout(ACQUIRE_TIMEOUT);
        let store = Self {
            pool: pool(most).connect_lazy_with(options.clone()),
            heartbeats: pool(HEARTBEAT_CONNECTIONS).connect_lazy_with(options),
            place: url.to_string(),
            retry,
        };
        store.check().await?;
        Ok(store)
    }

    async fn begin(&self, operation: &'static str) -> Result<Transaction<'static, Postgres>, StoreError> {
        self.pool.begin().await.map_err(|error| self.error(operation, error))
    }

    async fn commit(&self, operation: &'static str, transaction: Transaction<'_, Postgres>) -> Result<(), StoreError> {
        transaction.commit().await.map_err(|error| self.error(operation, error))
    }

    fn error(&self, operation: &'static str, source: sqlx::Error) -> StoreError {
        error::classified(&self.place, operation, source)
    }

    fn corrupt(&self, operation: &'static str, column: &'static str, reason: impl ToString) -> StoreError {
        StoreError::Corrupt { place: self.place.clone(), operation, column, reason: reason.to_string() }
    }
}

fn connect_options(url: &StoreUrl) -> Result<PgConnectOptions, StoreError> {
    let refuse = |reason: String| StoreError::Url { url: url.to_string(), reason };
    let StoreUrl::Postgres(text) = url else { return Err(refuse("this is no PostgreSQL database".to_owned())) };
    // The parser's own message may quote the URL, and with it a password.
    let options = PgConnectOptions::from_str(text)
        .map_err(|_| refuse("expected postgres://USER:PASSWORD@HOST:PORT/DATABASE".to_owned()))?;
    Ok(options.application_name("apbd").options(SERVER_LIMITS))
}

#[async_trait]
impl Store for PostgresStore {
    async fn enqueue(&self, jobs: &[NewJob]) -> Result<Vec<Enqueued>, StoreError> {
        self.enqueue_all(jobs).await
    }

    async fn reject(&self, rejection: &Rejection) -> Result<(), StoreError> {
        self.add_rejection(rejection).await
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Vec<Claim>, StoreError> {
        self.claim_jobs(request).await
    }

    async fn heartbeat(
        &self,
        worker: &WorkerId,
        lease: Duration,
        beats: &[Beat],
    ) -> Result<Vec<LeaseState>, StoreError> {
        self.renew(worker, lease, beats).await
    }

    async fn finish(&self, lease: &Lease, report: &AttemptReport) -> Result<bool, StoreError> {
        let mut transaction = self.begin("finish").await?;
        let ended = self.finish_attempt(&mut transaction, *lease, report).await?;
        if ended {
            self.commit("finish", transaction).await?;
        }
        Ok(ended)
    }

    async fn cancel(&self, job: JobId) -> Result<CancelOutcome, StoreError> {
        self.cancel_job(job).await
    }

    async fn cancels(&self, held: &[Lease]) -> Result<Vec<Lease>, StoreError> {
        self.asked_to_stop(held).await
    }

    async fn replay(&self, what: &Replay) -> Result<u64, StoreError> {
        self.replay_jobs(what).await
    }

    async fn sweep(&self) -> Result<Swept, StoreError> {
        self.sweep_jobs().await
    }

    async fn inbox_depth(&self, door: Option<Door>, at_most: u64) -> Result<InboxDepth, StoreError> {
        self.depth(door, at_most).await
    }

    async fn waits(&self) -> Result<Waits, StoreError> {
        self.longest_waits().await
    }

    async fn outbox_take(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxEvent>, StoreError> {
        self.take_events(limit, lease).await
    }

    async fn outbox_confirm(&self, events: &[uuid::Uuid]) -> Result<(), StoreError> {
        self.confirm_events(events).await
    }

    async fn outbox_return(&self, event: uuid::Uuid, reason: &str, after: Option<Duration>) -> Result<(), StoreError> {
        self.return_event(event, reason, after).await
    }

    async fn list(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        self.summaries(filter).await
    }

    async fn show(&self, job: JobId) -> Result<Option<JobDetail>, StoreError> {
        self.detail(job).await
    }

    async fn report(&self, view: ReportView, limit: u32) -> Result<ReportTable, StoreError> {
        self.report_rows(view, limit).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.check_schema().await
    }

    async fn close(&self) {
        self.pool.close().await;
        self.heartbeats.close().await;
    }
}
