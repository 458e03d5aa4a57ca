//! The store in a SQLite file: what `apbd run` keeps its state in, with the same behaviour as PostgreSQL.
//!
//! Invariant: one worker process at a time, by a lock on a file beside the database; every change is one `BEGIN IMMEDIATE` transaction.

mod costs;
mod drops;
mod exports;
mod finish;
mod forget;
mod inbox;
mod lock;
mod look;
mod meeting;
mod outbox;
mod rows;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Sqlite, Transaction};

use super::finish::Finish;
use super::{
    Access, AttemptReport, Beat, CancelOutcome, Claim, ClaimRequest, Door, Enqueued, InboxDepth, JobDetail, JobFilter,
    JobSummary, Lease, LeaseState, NewJob, OutboxEvent, Rejection, Replay, ReportTable, ReportView, Store, StoreError,
    StoreUrl, Swept, Waits,
};
use crate::job::retry::RetryPolicy;
use crate::job::{JobId, WorkerId};

/// How long a statement waits for another process's transaction; those last milliseconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECTIONS: u32 = 4;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("migrations/sqlite");

/// The database's clock in SQL: milliseconds since 1970.
macro_rules! now {
    () => {
        "CAST(unixepoch('subsec') * 1000 AS INTEGER)"
    };
}
use now;

/// A store in a file.
pub struct SqliteStore {
    pool: SqlitePool,
    path: PathBuf,
    retry: RetryPolicy,
    /// Held by a worker until it ends.
    _lock: Option<lock::WorkerLock>,
}

impl SqliteStore {
    /// Opens the file. A worker creates it and brings it up to date, and queues again what a worker that died held.
    pub async fn open(path: &Path, access: Access, retry: RetryPolicy) -> Result<Self, StoreError> {
        if access == Access::Client && !path.is_file() {
            let reason = "there is no such database; `apbd run` makes one".to_owned();
            return Err(StoreError::File { path: path.to_owned(), reason });
        }
        let lock = match access {
            Access::Worker => Some(lock::WorkerLock::take(path)?),
            Access::Client => None,
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(access == Access::Worker)
            .journal_mode(SqliteJournalMode::Wal)
            // With a write-ahead log, a result that was committed survives the end of the process; FULL keeps it over a power cut too.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).connect_with(options).await;
        let pool = pool.map_err(|error| StoreError::File { path: path.to_owned(), reason: error.to_string() })?;
        let store = Self { pool, path: path.to_owned(), retry, _lock: lock };
        match access {
            Access::Worker => {
                let failed = |error: sqlx::migrate::MigrateError| store.schema(error.to_string());
                MIGRATIONS.run(&store.pool).await.map_err(failed)?;
                store.requeue_orphans().await?;
            }
            Access::Client => store.check().await?,
        }
        Ok(store)
    }

    async fn begin(&self, operation: &'static str) -> Result<Transaction<'static, Sqlite>, StoreError> {
        self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(|error| self.error(operation, error))
    }

    async fn commit(&self, operation: &'static str, transaction: Transaction<'_, Sqlite>) -> Result<(), StoreError> {
        transaction.commit().await.map_err(|error| self.error(operation, error))
    }

    fn place(&self) -> String {
        StoreUrl::Sqlite(self.path.clone()).to_string()
    }

    fn schema(&self, reason: String) -> StoreError {
        StoreError::Schema { place: self.place(), reason }
    }

    fn error(&self, operation: &'static str, source: sqlx::Error) -> StoreError {
        let place = self.place();
        let busy =
            matches!(&source, sqlx::Error::Database(error) if matches!(error.code().as_deref(), Some("5" | "6")));
        match source {
            sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut => StoreError::Unavailable { place, operation, source },
            source if busy => StoreError::Unavailable { place, operation, source },
            source => StoreError::Refused { place, operation, source },
        }
    }

    fn corrupt(&self, operation: &'static str, column: &'static str, reason: impl ToString) -> StoreError {
        StoreError::Corrupt { place: self.place(), operation, column, reason: reason.to_string() }
    }
}

#[async_trait]
impl Store for SqliteStore {
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
        let sql = "SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success";
        let version: i64 = match sqlx::query_scalar(sql).fetch_one(&self.pool).await {
            Ok(version) => version,
            Err(sqlx::Error::Database(_)) => return Err(self.schema("this is no database of apbd".to_owned())),
            Err(error) => return Err(self.error("check", error)),
        };
        let expected = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0);
        match version == expected {
            true => Ok(()),
            false => Err(self.schema(format!("its schema has version {version}, this program needs {expected}"))),
        }
    }

    async fn close(&self) {
        self.pool.close().await;
    }
}
