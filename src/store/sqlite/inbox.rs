//! Jobs in: enqueueing, rejections, depth.
//!
//! Invariant: a job that was answered `Inserted` is on disk with all its documents.

use sqlx::{Row, Sqlite, Transaction};

use super::{SqliteStore, now};
use crate::store::{Door, Enqueued, InboxDepth, NewJob, Rejection, StoreError, name_of};

const INSERT_JOB: &str = concat!(
    "INSERT INTO jobs (job_id, payload_digest, message, task, document, model, priority, deadline, size_bytes, door, origin, reply_target, ",
    "reply_correlation, state, available_at, enqueued_at) ",
    "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 'queued', ",
    now!(),
    ", ",
    now!(),
    ") ON CONFLICT (job_id) DO NOTHING"
);

const INSERT_REJECTION: &str = concat!(
    "INSERT INTO rejections (door, origin, digest, message_id, job_id, code, reason, size_bytes, rejected_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, ",
    now!(),
    ") ON CONFLICT DO NOTHING"
);

// A statement each: with a state or a door as parameter no plan could rest on the index of just those rows.
const QUEUED: &str = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE state = 'queued' LIMIT $1)";
const QUEUED_OF_DOOR: &str = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE state = 'queued' AND door = $2 LIMIT $1)";
const RUNNING: &str = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE state = 'running' LIMIT $1)";

impl SqliteStore {
    pub(super) async fn enqueue_all(&self, jobs: &[NewJob]) -> Result<Vec<Enqueued>, StoreError> {
        let mut transaction = self.begin("enqueue").await?;
        let mut answers = Vec::with_capacity(jobs.len());
        for new in jobs {
            answers.push(self.enqueue_one(&mut transaction, new).await?);
        }
        self.commit("enqueue", transaction).await?;
        Ok(answers)
    }

    async fn enqueue_one(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
        new: &NewJob,
    ) -> Result<Enqueued, StoreError> {
        let error = |error| self.error("enqueue", error);
        let job = &new.job;
        let (id, digest) = (job.id.to_string(), job.payload_digest.to_string());
        let message = serde_json::to_string(&job.message).map_err(|error| self.corrupt("enqueue", "message", error))?;
        let document = job.documents.first().map(|document| document.uri.to_string()).unwrap_or_default();
        let inserted = sqlx::query(INSERT_JOB)
            .bind(&id)
            .bind(&digest)
            .bind(message)
            .bind(job.task.as_str())
            .bind(document)
            .bind(&job.model)
            .bind(i64::from(job.priority.get()))
            .bind(job.deadline.map(|deadline| deadline.timestamp_millis()))
            .bind(new.size_bytes.map(|bytes| bytes as i64))
            .bind(name_of(&new.door))
            .bind(&new.origin)
            .bind(new.reply.as_ref().map(|reply| reply.target.as_str()))
            .bind(new.reply.as_ref().and_then(|reply| reply.correlation_id.as_deref()))
            .execute(&mut **transaction)
            .await
            .map_err(error)?;
        if inserted.rows_affected() == 0 {
            let sql = "SELECT payload_digest, state FROM jobs WHERE job_id = $1";
            let row = sqlx::query(sql).bind(&id).fetch_one(&mut **transaction).await.map_err(error)?;
            let state = self.parsed("enqueue", "state", row.get::<String, _>(1))?;
            return Ok(if row.get::<String, _>(0) == digest {
                Enqueued::Duplicate { state }
            } else {
                Enqueued::Conflict
            });
        }
        for (position, document) in job.documents.iter().enumerate() {
            sqlx::query("INSERT INTO documents (job_id, position, uri) VALUES ($1, $2, $3)")
                .bind(&id)
                .bind(position as i64)
                .bind(document.uri.to_string())
                .execute(&mut **transaction)
                .await
                .map_err(error)?;
        }
        Ok(Enqueued::Inserted)
    }

    pub(super) async fn add_rejection(&self, rejection: &Rejection) -> Result<(), StoreError> {
        sqlx::query(INSERT_REJECTION)
            .bind(name_of(&rejection.door))
            .bind(&rejection.origin)
            .bind(rejection.digest.to_string())
            .bind(&rejection.message_id)
            .bind(rejection.job_id.map(|id| id.to_string()))
            .bind(rejection.code.as_str())
            .bind(&rejection.reason)
            .bind(rejection.size_bytes as i64)
            .execute(&self.pool)
            .await
            .map_err(|error| self.error("reject", error))?;
        Ok(())
    }

    pub(super) async fn depth(&self, door: Option<Door>, at_most: u64) -> Result<InboxDepth, StoreError> {
        let at_most = i64::try_from(at_most).unwrap_or(i64::MAX);
        let queued = match door {
            None => sqlx::query_scalar(QUEUED).bind(at_most),
            Some(door) => sqlx::query_scalar(QUEUED_OF_DOOR).bind(at_most).bind(name_of(&door)),
        };
        let error = |error| self.error("inbox_depth", error);
        let queued: i64 = queued.fetch_one(&self.pool).await.map_err(error)?;
        let running: i64 = sqlx::query_scalar(RUNNING).bind(at_most).fetch_one(&self.pool).await.map_err(error)?;
        Ok(InboxDepth { queued: queued.unsigned_abs(), running: running.unsigned_abs() })
    }
}
