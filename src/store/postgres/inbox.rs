//! Jobs in: enqueueing, rejections, depth.
//!
//! Invariant: a job that was answered `Inserted` is committed with all its documents.

use std::collections::{HashMap, HashSet};

use sqlx::Row;
use uuid::Uuid;

use super::PostgresStore;
use crate::job::clean::clean;
use crate::store::{Door, Enqueued, InboxDepth, JobState, NewJob, Rejection, StoreError, name_of};

/// One statement a batch. Rows go in by id, so that two batches with the same jobs wait for each other and never in a
/// circle; the microseconds keep the order in which they came.
const INSERT_JOBS: &str = "\
INSERT INTO jobs (job_id, payload_digest, message, task, document, model, priority, deadline, size_bytes, door, origin, reply_target, \
                  reply_correlation, state, available_at, enqueued_at) \
SELECT job_id, payload_digest, message, task, document, model, priority, deadline, size_bytes, door, origin, reply_target, \
       reply_correlation, 'queued', now(), now() + place * interval '1 microsecond' \
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], $8::timestamptz[], $9::bigint[], \
            $10::text[], $11::text[], $12::text[], $13::text[]) WITH ORDINALITY \
     AS new (job_id, payload_digest, message, task, document, model, priority, deadline, size_bytes, door, origin, reply_target, \
             reply_correlation, place) \
ORDER BY job_id, place \
ON CONFLICT (job_id) DO NOTHING RETURNING job_id";

const INSERT_DOCUMENTS: &str =
    "INSERT INTO documents (job_id, position, uri) SELECT * FROM unnest($1::uuid[], $2::integer[], $3::text[])";

const INSERT_REJECTION: &str = "\
INSERT INTO rejections (door, origin, digest, message_id, job_id, code, reason, size_bytes, rejected_at) \
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now()) ON CONFLICT DO NOTHING";

// A statement each: with a state or a door as parameter no plan could rest on the index of just those rows.
const QUEUED: &str = "SELECT count(*) FROM (SELECT FROM jobs WHERE state = 'queued' LIMIT $1) AS j";
const QUEUED_OF_DOOR: &str =
    "SELECT count(*) FROM (SELECT FROM jobs WHERE state = 'queued' AND door = $2 LIMIT $1) AS j";
const RUNNING: &str = "SELECT count(*) FROM (SELECT FROM jobs WHERE state = 'running' LIMIT $1) AS j";

impl PostgresStore {
    pub(super) async fn enqueue_all(&self, jobs: &[NewJob]) -> Result<Vec<Enqueued>, StoreError> {
        let error = |error| self.error("enqueue", error);
        let mut messages = Vec::with_capacity(jobs.len());
        for new in jobs {
            let message = serde_json::to_string(&new.job.message);
            messages.push(message.map_err(|error| self.corrupt("enqueue", "message", error))?);
        }
        let mut transaction = self.begin("enqueue").await?;
        let inserted: Vec<Uuid> = sqlx::query_scalar(INSERT_JOBS)
            .bind(column(jobs, |new| new.job.id.uuid()))
            .bind(column(jobs, |new| new.job.payload_digest.to_string()))
            .bind(messages)
            .bind(column(jobs, |new| new.job.task.as_str()))
            .bind(column(jobs, |new| new.job.documents.first().map(|first| first.uri.to_string()).unwrap_or_default()))
            .bind(column(jobs, |new| new.job.model.clone()))
            .bind(column(jobs, |new| i16::from(new.job.priority.get())))
            .bind(column(jobs, |new| new.job.deadline))
            .bind(column(jobs, |new| new.size_bytes.map(|bytes| bytes as i64)))
            .bind(column(jobs, |new| name_of(&new.door)))
            .bind(column(jobs, |new| clean(&new.origin)))
            .bind(column(jobs, |new| new.reply.as_ref().map(|reply| clean(&reply.target))))
            .bind(column(jobs, |new| new.reply.as_ref().and_then(|reply| reply.correlation_id.as_deref()).map(clean)))
            .fetch_all(&mut *transaction)
            .await
            .map_err(error)?;
        let mut fresh: HashSet<Uuid> = inserted.into_iter().collect();
        let documents: Vec<(Uuid, i32, String)> = rows_of_documents(jobs, &fresh);
        sqlx::query(INSERT_DOCUMENTS)
            .bind(documents.iter().map(|row| row.0).collect::<Vec<_>>())
            .bind(documents.iter().map(|row| row.1).collect::<Vec<_>>())
            .bind(documents.iter().map(|row| row.2.as_str()).collect::<Vec<_>>())
            .execute(&mut *transaction)
            .await
            .map_err(error)?;
        let known = "SELECT job_id, payload_digest, state FROM jobs WHERE job_id = ANY($1)";
        let known = sqlx::query(known).bind(column(jobs, |new| new.job.id.uuid())).fetch_all(&mut *transaction).await;
        let mut there: HashMap<Uuid, (String, JobState)> = HashMap::new();
        for row in &known.map_err(error)? {
            there.insert(row.get("job_id"), (row.get("payload_digest"), self.parsed("enqueue", "state", row)?));
        }
        self.commit("enqueue", transaction).await?;
        let answer = |new: &NewJob| match there.get(&new.job.id.uuid()) {
            Some((digest, state)) if *digest == new.job.payload_digest.to_string() => {
                // Only the first of several in one batch was inserted.
                if fresh.remove(&new.job.id.uuid()) {
                    Enqueued::Inserted
                } else {
                    Enqueued::Duplicate { state: *state }
                }
            }
            _ => Enqueued::Conflict,
        };
        Ok(jobs.iter().map(answer).collect())
    }

    pub(super) async fn add_rejection(&self, rejection: &Rejection) -> Result<(), StoreError> {
        sqlx::query(INSERT_REJECTION)
            .bind(name_of(&rejection.door))
            .bind(clean(&rejection.origin))
            .bind(rejection.digest.to_string())
            .bind(rejection.message_id.as_deref().map(clean))
            .bind(rejection.job_id.map(|id| id.uuid()))
            .bind(rejection.code.as_str())
            .bind(clean(&rejection.reason))
            .bind(rejection.size_bytes as i64)
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|error| self.error("reject", error))
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

fn column<'a, T>(jobs: &'a [NewJob], value: impl Fn(&'a NewJob) -> T) -> Vec<T> {
    jobs.iter().map(value).collect()
}

/// Of each job that is new, once.
fn rows_of_documents(jobs: &[NewJob], fresh: &HashSet<Uuid>) -> Vec<(Uuid, i32, String)> {
    let mut left = fresh.clone();
    let mut rows = Vec::new();
    for new in jobs.iter().filter(|new| left.remove(&new.job.id.uuid())) {
        let documents = new.job.documents.iter().zip(0..);
        rows.extend(documents.map(|(document, position)| (new.job.id.uuid(), position, document.uri.to_string())));
    }
    rows
}
