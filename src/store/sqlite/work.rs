//! Jobs in the hands of workers: claims, heartbeats, cancels, replays, and what is done about workers that went away.
//!
//! Invariant: whoever claims raises the attempt, and no later write of an earlier attempt changes anything.

use std::time::Duration;

use serde_json::json;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};

use super::rows::STAGE_COLUMNS;
use super::{SqliteStore, now};
use crate::job::retry::{Failures, Verdict};
use crate::job::{Attempt, ErrorCode, JobError, JobId, StageTimes, WorkerId};
use crate::store::finish::Finish;
use crate::store::{
    AttemptReport, Beat, CancelOutcome, Claim, ClaimRequest, Ending, JobState, Lease, LeaseState, Replay, StoreError,
    Swept,
};

/// Whose turn it is. `$2` and `$3` are JSON lists or NULL.
const NEXT: &str = concat!(
    "SELECT job_id FROM jobs WHERE state = 'queued' AND available_at <= ",
    now!(),
    " AND (deadline IS NULL OR deadline > ",
    now!(),
    ") AND ($2 IS NULL OR model IS NULL OR model IN (SELECT value FROM json_each($2)))",
    " AND ($3 IS NULL OR job_id IN (SELECT value FROM json_each($3)))",
    " AND ($4 IS NULL OR size_bytes IS NULL OR size_bytes <= $4)",
    " ORDER BY priority DESC, deadline IS NULL, deadline, size_bytes IS NULL, size_bytes, enqueued_at, rowid LIMIT $1"
);

const CLAIM: &str = concat!(
    "UPDATE jobs SET state = 'running', attempt = attempt + 1, worker = $2, started_at = ",
    now!(),
    ", lease_until = ",
    now!(),
    " + $3, progress = NULL WHERE job_id = $1 ",
    "RETURNING message, attempt, suspect_failures, infra_failures, max(0, started_at - available_at) AS queued_ms"
);

const BEGIN_ATTEMPT: &str = concat!(
    "INSERT INTO attempts (job_id, attempt, worker, started_at, outcome) VALUES ($1, $2, $3, ",
    now!(),
    ", 'running')"
);

const RENEW: &str = concat!(
    "UPDATE jobs SET lease_until = ",
    now!(),
    " + $4, progress = coalesce($5, progress) WHERE job_id = $1 AND attempt = $2 AND worker = $3 AND state = 'running' ",
    "RETURNING cancel_requested"
);

/// `$1` is a JSON list.
const ASKED_TO_STOP: &str = "SELECT job_id, attempt FROM jobs \
    WHERE job_id IN (SELECT value FROM json_each($1)) AND cancel_requested AND state = 'running'";

/// Jobs whose worker is gone: all running ones if `$1`, else those whose lease has expired.
const ORPHANS: &str = concat!(
    "SELECT job_id, attempt, suspect_failures, infra_failures, cancel_requested FROM jobs WHERE state = 'running' AND ($1 OR lease_until < ",
    now!(),
    ")"
);

const EXPIRED: &str = concat!("SELECT job_id, attempt FROM jobs WHERE state = 'queued' AND deadline <= ", now!());

const REPLAY: &str = concat!(
    "UPDATE jobs SET state = 'queued', suspect_failures = 0, infra_failures = 0, cancel_requested = 0, finished_at = NULL, ",
    "error_code = NULL, error_message = NULL, available_at = ",
    now!(),
    " WHERE (state = $1 AND $2 IS NULL) OR (state IN ('dead', 'failed', 'cancelled') AND job_id IN (SELECT value FROM json_each($2)))"
);

impl SqliteStore {
    pub(super) async fn claim_jobs(&self, request: &ClaimRequest) -> Result<Vec<Claim>, StoreError> {
        let error = |error| self.error("claim", error);
        let models = (!request.models.is_empty()).then(|| json!(request.models).to_string());
        let only = request.only.as_ref().map(|jobs| json!(jobs).to_string());
        let mut transaction = self.begin("claim").await?;
        let next: Vec<String> = sqlx::query_scalar(NEXT)
            .bind(i64::from(request.limit))
            .bind(models)
            .bind(only)
            .bind(request.max_bytes.map(|bytes| bytes as i64))
            .fetch_all(&mut *transaction)
            .await
            .map_err(error)?;
        let mut claims = Vec::with_capacity(next.len());
        for id in next {
            claims.push(self.claim_one(&mut transaction, &id, request).await?);
        }
        self.commit("claim", transaction).await?;
        Ok(claims)
    }

    async fn claim_one(
        &self,
        transaction: &mut Transaction<'static, Sqlite>,
        id: &str,
        request: &ClaimRequest,
    ) -> Result<Claim, StoreError> {
        let error = |error| self.error("claim", error);
        let lease = request.lease.as_millis() as i64;
        let claimed = sqlx::query(CLAIM).bind(id).bind(request.worker.as_str()).bind(lease);
        let row = claimed.fetch_one(&mut **transaction).await.map_err(error)?;
        let attempt: i64 = row.get("attempt");
        let began = sqlx::query(BEGIN_ATTEMPT).bind(id).bind(attempt).bind(request.worker.as_str());
        began.execute(&mut **transaction).await.map_err(error)?;
        Ok(Claim {
            job: self.job("claim", row.get("message"))?,
            attempt: Attempt::new(attempt as u32),
            failures: failures(&row),
            queued_for: Duration::from_millis(row.get::<i64, _>("queued_ms") as u64),
        })
    }

    pub(super) async fn renew(
        &self,
        worker: &WorkerId,
        lease: Duration,
        beats: &[Beat],
    ) -> Result<Vec<LeaseState>, StoreError> {
        let mut transaction = self.begin("heartbeat").await?;
        let mut states = Vec::with_capacity(beats.len());
        for beat in beats {
            let renewed: Option<i64> = sqlx::query_scalar(RENEW)
                .bind(beat.lease.job.to_string())
                .bind(i64::from(beat.lease.attempt.get()))
                .bind(worker.as_str())
                .bind(lease.as_millis() as i64)
                .bind(beat.progress.map(|progress| json!(progress).to_string()))
                .fetch_optional(&mut *transaction)
                .await
                .map_err(|error| self.error("heartbeat", error))?;
            states.push(match renewed {
                None => LeaseState::Lost,
                Some(0) => LeaseState::Held,
                Some(_) => LeaseState::CancelRequested,
            });
        }
        self.commit("heartbeat", transaction).await?;
        Ok(states)
    }

    pub(super) async fn cancel_job(&self, job: JobId) -> Result<CancelOutcome, StoreError> {
        let error = |error| self.error("cancel", error);
        let mut transaction = self.begin("cancel").await?;
        let found = sqlx::query("SELECT state, attempt FROM jobs WHERE job_id = $1").bind(job.to_string());
        let Some(row) = found.fetch_optional(&mut *transaction).await.map_err(error)? else {
            return Ok(CancelOutcome::NotFound);
        };
        let outcome = match self.parsed("cancel", "state", row.get("state"))? {
            JobState::Queued => {
                let lease = Lease { job, attempt: Attempt::new(row.get::<i64, _>("attempt") as u32) };
                let error = JobError::new(ErrorCode::Cancelled, "cancelled while it waited");
                self.end_waiting(&mut transaction, lease, error, Verdict::Cancelled).await?;
                CancelOutcome::Cancelled
            }
            JobState::Running => {
                let asked = sqlx::query("UPDATE jobs SET cancel_requested = 1 WHERE job_id = $1").bind(job.to_string());
                asked.execute(&mut *transaction).await.map_err(error)?;
                CancelOutcome::Requested
            }
            state => CancelOutcome::AlreadyFinal(state),
        };
        self.commit("cancel", transaction).await?;
        Ok(outcome)
    }

    pub(super) async fn asked_to_stop(&self, held: &[Lease]) -> Result<Vec<Lease>, StoreError> {
        let jobs: Vec<JobId> = held.iter().map(|lease| lease.job).collect();
        let rows = sqlx::query(ASKED_TO_STOP).bind(json!(jobs).to_string()).fetch_all(&self.pool).await;
        let rows = rows.map_err(|error| self.error("cancels", error))?;
        let leases: Vec<Lease> = rows.iter().map(|row| self.lease_of("cancels", row)).collect::<Result<_, _>>()?;
        Ok(leases.into_iter().filter(|lease| held.contains(lease)).collect())
    }

    pub(super) async fn replay_jobs(&self, what: &Replay) -> Result<u64, StoreError> {
        let (state, jobs) = match what {
            Replay::Jobs(jobs) => ("", Some(json!(jobs).to_string())),
            Replay::Dead => ("dead", None),
            Replay::Failed => ("failed", None),
        };
        let replayed = sqlx::query(REPLAY).bind(state).bind(jobs).execute(&self.pool).await;
        replayed.map(|done| done.rows_affected()).map_err(|error| self.error("replay", error))
    }

    pub(super) async fn sweep_jobs(&self) -> Result<Swept, StoreError> {
        let mut transaction = self.begin("sweep").await?;
        let mut swept = Swept::default();
        self.release_orphans(&mut transaction, false, &mut swept).await?;
        let expired =
            sqlx::query(EXPIRED).fetch_all(&mut *transaction).await.map_err(|error| self.error("sweep", error))?;
        for row in &expired {
            let error = JobError::new(ErrorCode::DeadlineExceeded, "its deadline passed while it waited");
            self.end_waiting(&mut transaction, self.lease_of("sweep", row)?, error, Verdict::Fail).await?;
            swept.expired += 1;
        }
        self.commit("sweep", transaction).await?;
        Ok(swept)
    }

    /// The lock is ours, so that whoever holds a job is dead.
    pub(super) async fn requeue_orphans(&self) -> Result<(), StoreError> {
        let mut transaction = self.begin("open").await?;
        self.release_orphans(&mut transaction, true, &mut Swept::default()).await?;
        self.commit("open", transaction).await
    }

    async fn release_orphans(
        &self,
        transaction: &mut Transaction<'static, Sqlite>,
        all: bool,
        swept: &mut Swept,
    ) -> Result<(), StoreError> {
        let orphans = sqlx::query(ORPHANS).bind(all).fetch_all(&mut **transaction).await;
        for row in &orphans.map_err(|error| self.error("sweep", error))? {
            let lease = self.lease_of("sweep", row)?;
            let error = JobError::new(ErrorCode::WorkerDied, "its worker was gone before it was done");
            let verdict = match row.get::<i64, _>("cancel_requested") {
                0 => self.retry.verdict(lease.job, lease.attempt, failures(row), &error),
                _ => Verdict::Cancelled,
            };
            // A dead process is no busy service: the next worker may begin at once.
            let verdict = match verdict {
                Verdict::Retry { counter, .. } if all => Verdict::Retry { after: Duration::ZERO, counter },
                verdict => verdict,
            };
            match verdict {
                Verdict::Cancelled => swept.cancelled += 1,
                Verdict::Quarantine | Verdict::Fail => swept.quarantined += 1,
                Verdict::Retry { .. } | Verdict::Requeue { .. } => swept.requeued += 1,
            }
            let ending = Ending::Errored { error, verdict };
            let report = AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() };
            self.end_attempt(transaction, lease, &report, "lost").await?;
        }
        Ok(())
    }

    pub(super) fn lease_of(&self, operation: &'static str, row: &SqliteRow) -> Result<Lease, StoreError> {
        let job = self.parsed(operation, "job_id", row.get("job_id"))?;
        Ok(Lease { job, attempt: Attempt::new(row.get::<i64, _>("attempt") as u32) })
    }
}

pub(super) fn failures(row: &SqliteRow) -> Failures {
    let count = |column: &str| row.get::<i64, _>(column) as u32;
    Failures { suspect: count("suspect_failures"), infra: count("infra_failures") }
}

/// All columns of an attempt but its key.
pub(super) fn attempt_columns() -> String {
    format!("attempt, worker, started_at, ended_at, outcome, error_code, error_message, {STAGE_COLUMNS}")
}
