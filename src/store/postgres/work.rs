//! Jobs in the hands of workers: claims, heartbeats, cancels, replays, and what is done about workers that went away.
//!
//! Invariant: whoever claims raises the attempt, and no later write of an earlier attempt changes anything.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PostgresStore;
use super::rows::{attempt, failures, interval, lease};
use crate::job::retry::Verdict;
use crate::job::{ErrorCode, JobError, JobId, StageTimes, WorkerId};
use crate::store::finish::Finish;
use crate::store::{
    AttemptReport, Beat, CancelOutcome, Claim, ClaimRequest, Ending, JobState, Lease, LeaseState, Replay, StoreError,
    Swept,
};

/// In the order of the index `jobs_to_claim`, whose first rows that nobody else is claiming are taken.
const CLAIM: &str = "\
WITH next AS ( \
    SELECT job_id FROM jobs \
    WHERE state = 'queued' AND available_at <= now() AND (deadline IS NULL OR deadline > now()) \
      AND ($2::text[] IS NULL OR model IS NULL OR model = ANY($2)) \
      AND ($3::uuid[] IS NULL OR job_id = ANY($3)) \
      AND ($4::bigint IS NULL OR size_bytes IS NULL OR size_bytes <= $4) \
    ORDER BY priority DESC, deadline, size_bytes, enqueued_at, job_id LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED \
), claimed AS ( \
    UPDATE jobs SET state = 'running', attempt = attempt + 1, worker = $5, started_at = clock_timestamp(), \
                    lease_until = clock_timestamp() + $6, progress = NULL \
    FROM next WHERE jobs.job_id = next.job_id \
    RETURNING jobs.* \
), began AS ( \
    INSERT INTO attempts (job_id, attempt, worker, started_at, outcome) SELECT job_id, attempt, worker, started_at, 'running' FROM claimed \
) \
SELECT job_id, message, attempt, suspect_failures, infra_failures, \
       greatest(0, extract(epoch FROM started_at - available_at) * 1000)::bigint AS queued_ms \
FROM claimed ORDER BY priority DESC, deadline, size_bytes, enqueued_at, job_id";

const RENEW: &str = "\
UPDATE jobs SET lease_until = clock_timestamp() + $4, progress = coalesce(beat.progress, jobs.progress) \
FROM unnest($1::uuid[], $2::integer[], $3::jsonb[]) AS beat (job_id, attempt, progress) \
WHERE jobs.job_id = beat.job_id AND jobs.attempt = beat.attempt AND jobs.worker = $5 AND jobs.state = 'running' \
RETURNING jobs.job_id, jobs.attempt, jobs.cancel_requested";

const ASKED_TO_STOP: &str =
    "SELECT job_id, attempt FROM jobs WHERE job_id = ANY($1) AND cancel_requested AND state = 'running'";

/// One at a time and each in a transaction of its own, so that several sweepers share the work and block nobody.
const ORPHAN: &str = "\
SELECT job_id, attempt, suspect_failures, infra_failures, cancel_requested FROM jobs \
WHERE state = 'running' AND lease_until < now() LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED";

const EXPIRED: &str = "\
SELECT job_id, attempt FROM jobs WHERE state = 'queued' AND deadline <= now() LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED";

const REPLAY: &str = "\
UPDATE jobs SET state = 'queued', suspect_failures = 0, infra_failures = 0, cancel_requested = false, finished_at = NULL, \
                error_code = NULL, error_message = NULL, available_at = now() \
WHERE ($2::uuid[] IS NULL AND state = $1) OR (state IN ('dead', 'failed', 'cancelled') AND job_id = ANY($2))";

/// Jobs that one sweep takes care of, of each kind; the next sweep goes on.
const SWEEP_MOST: usize = 1000;

impl PostgresStore {
    pub(super) async fn claim_jobs(&self, request: &ClaimRequest) -> Result<Vec<Claim>, StoreError> {
        let only = request.only.as_ref().map(|jobs| jobs.iter().map(|job| job.uuid()).collect::<Vec<_>>());
        let rows = sqlx::query(CLAIM)
            .bind(i64::from(request.limit))
            .bind((!request.models.is_empty()).then_some(&request.models))
            .bind(only)
            .bind(request.max_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)))
            .bind(request.worker.as_str())
            .bind(interval(request.lease))
            .fetch_all(&self.pool)
            .await
            .map_err(|error| self.error("claim", error))?;
        let claim = |row: &PgRow| {
            Ok(Claim {
                job: self.job("claim", row)?,
                attempt: attempt(row),
                failures: failures(row),
                queued_for: Duration::from_millis(row.get::<i64, _>("queued_ms").unsigned_abs()),
            })
        };
        rows.iter().map(claim).collect()
    }

    pub(super) async fn renew(
        &self,
        worker: &WorkerId,
        lease: Duration,
        beats: &[Beat],
    ) -> Result<Vec<LeaseState>, StoreError> {
        let progress = |beat: &Beat| beat.progress.map(|progress| json!(progress));
        let rows = sqlx::query(RENEW)
            .bind(beats.iter().map(|beat| beat.lease.job.uuid()).collect::<Vec<_>>())
            .bind(beats.iter().map(|beat| beat.lease.attempt.get() as i32).collect::<Vec<_>>())
            .bind(beats.iter().map(progress).collect::<Vec<_>>())
            .bind(interval(lease))
            .bind(worker.as_str())
            .fetch_all(&self.heartbeats)
            .await
            .map_err(|error| self.error("heartbeat", error))?;
        let held: HashMap<_, bool> =
            rows.iter().map(|row| (super::rows::lease(row), row.get("cancel_requested"))).collect();
        let state = |beat: &Beat| match held.get(&beat.lease) {
            None => LeaseState::Lost,
            Some(false) => LeaseState::Held,
            Some(true) => LeaseState::CancelRequested,
        };
        Ok(beats.iter().map(state).collect())
    }

    pub(super) async fn cancel_job(&self, job: JobId) -> Result<CancelOutcome, StoreError> {
        let error = |error| self.error("cancel", error);
        let mut transaction = self.begin("cancel").await?;
        // Locked, so that it is not claimed between the look and the change.
        let found = sqlx::query("SELECT job_id, state, attempt FROM jobs WHERE job_id = $1 FOR NO KEY UPDATE");
        let Some(row) = found.bind(job.uuid()).fetch_optional(&mut *transaction).await.map_err(error)? else {
            return Ok(CancelOutcome::NotFound);
        };
        let outcome = match self.parsed("cancel", "state", &row)? {
            JobState::Queued => {
                let error = JobError::new(ErrorCode::Cancelled, "cancelled while it waited");
                self.end_waiting(&mut transaction, lease(&row), error, Verdict::Cancelled).await?;
                CancelOutcome::Cancelled
            }
            JobState::Running => {
                let asked = sqlx::query("UPDATE jobs SET cancel_requested = true WHERE job_id = $1").bind(job.uuid());
                asked.execute(&mut *transaction).await.map_err(error)?;
                CancelOutcome::Requested
            }
            state => CancelOutcome::AlreadyFinal(state),
        };
        self.commit("cancel", transaction).await?;
        Ok(outcome)
    }

    pub(super) async fn asked_to_stop(&self, held: &[Lease]) -> Result<Vec<Lease>, StoreError> {
        let asked = sqlx::query(ASKED_TO_STOP).bind(held.iter().map(|lease| lease.job.uuid()).collect::<Vec<_>>());
        let rows = asked.fetch_all(&self.heartbeats).await.map_err(|error| self.error("cancels", error))?;
        Ok(rows.iter().map(lease).filter(|lease| held.contains(lease)).collect())
    }

    pub(super) async fn replay_jobs(&self, what: &Replay) -> Result<u64, StoreError> {
        let (state, jobs) = match what {
            Replay::Jobs(jobs) => ("", Some(jobs.iter().map(|job| job.uuid()).collect::<Vec<Uuid>>())),
            Replay::Dead => ("dead", None),
            Replay::Failed => ("failed", None),
        };
        let replayed = sqlx::query(REPLAY).bind(state).bind(jobs).execute(&self.pool).await;
        replayed.map(|done| done.rows_affected()).map_err(|error| self.error("replay", error))
    }

    pub(super) async fn sweep_jobs(&self) -> Result<Swept, StoreError> {
        let mut swept = Swept::default();
        for _ in 0..SWEEP_MOST {
            if !self.release_orphan(&mut swept).await? {
                break;
            }
        }
        for _ in 0..SWEEP_MOST {
            if !self.fail_expired().await? {
                break;
            }
            swept.expired += 1;
        }
        Ok(swept)
    }

    /// `false`: there was none.
    async fn release_orphan(&self, swept: &mut Swept) -> Result<bool, StoreError> {
        let mut transaction = self.begin("sweep").await?;
        let orphan = sqlx::query(ORPHAN).fetch_optional(&mut *transaction).await;
        let Some(row) = orphan.map_err(|error| self.error("sweep", error))? else { return Ok(false) };
        let lease = lease(&row);
        let error = JobError::new(ErrorCode::WorkerDied, "its worker was gone before it was done");
        let verdict = match row.get::<bool, _>("cancel_requested") {
            false => self.retry.verdict(lease.job, lease.attempt, failures(&row), &error),
            true => Verdict::Cancelled,
        };
        let ending = Ending::Errored { error, verdict };
        let report = AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() };
        self.end_attempt(&mut transaction, lease, &report, "lost").await?;
        self.commit("sweep", transaction).await?;
        match verdict {
            Verdict::Cancelled => swept.cancelled += 1,
            Verdict::Quarantine | Verdict::Fail => swept.quarantined += 1,
            Verdict::Retry { .. } | Verdict::Requeue { .. } => swept.requeued += 1,
        }
        Ok(true)
    }

    /// `false`: there was none.
    async fn fail_expired(&self) -> Result<bool, StoreError> {
        let mut transaction = self.begin("sweep").await?;
        let expired = sqlx::query(EXPIRED).fetch_optional(&mut *transaction).await;
        let Some(row) = expired.map_err(|error| self.error("sweep", error))? else { return Ok(false) };
        let error = JobError::new(ErrorCode::DeadlineExceeded, "its deadline passed while it waited");
        self.end_waiting(&mut transaction, lease(&row), error, Verdict::Fail).await?;
        self.commit("sweep", transaction).await?;
        Ok(true)
    }
}
