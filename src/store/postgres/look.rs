//! What people see of the store: lists, one job in full, report views.
//!
//! Invariant: changes nothing.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Column, Executor, Row, TypeInfo, ValueRef};

use super::PostgresStore;
use super::rows::{attempt, failures, stage_times, tokens};
use crate::job::{Digest, DocumentFacts, JobId, JobResult, Priority, ResultFlags};
use crate::store::{
    AttemptRecord, DocumentRecord, JobDetail, JobFilter, JobSummary, ReportTable, ReportView, StoreError, Waits,
};

const LIST: &str = "\
SELECT *, coalesce(served_by, model) AS shown_model FROM jobs \
WHERE ($1::text[] IS NULL OR state = ANY($1)) AND ($2::uuid[] IS NULL OR job_id = ANY($2)) \
ORDER BY enqueued_at DESC, job_id LIMIT $3";

const OPERATION: &str = "show";

/// The wait since `available_at`, not since the enqueueing: a job that was replayed, or that a back-off held up, has not waited before.
const WAITS: &str = "\
SELECT (SELECT extract(epoch FROM now() - min(available_at)) FROM jobs WHERE state = 'queued' AND available_at <= now())::double precision AS job, \
       (SELECT extract(epoch FROM now() - min(j.finished_at)) FROM jobs j \
        JOIN (SELECT job_id FROM outbox WHERE given_up IS NULL ORDER BY available_at LIMIT 1000) AS o USING (job_id))::double precision AS event, \
       (SELECT count(*) FROM (SELECT FROM outbox WHERE given_up IS NOT NULL LIMIT 1000) AS g) AS given_up";

impl PostgresStore {
    pub(super) async fn longest_waits(&self) -> Result<Waits, StoreError> {
        let row = sqlx::query(WAITS).fetch_one(&self.pool).await.map_err(|error| self.error("waits", error))?;
        Ok(Waits::of_seconds(row.get("job"), row.get("event"), row.get("given_up")))
    }

    pub(super) async fn summaries(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        let states: Vec<&str> = filter.states.iter().map(|state| state.as_str()).collect();
        let only = filter.only.as_ref().map(|jobs| jobs.iter().map(|job| job.uuid()).collect::<Vec<_>>());
        let rows = sqlx::query(LIST)
            .bind((!states.is_empty()).then_some(states))
            .bind(only)
            .bind(i64::from(filter.limit))
            .fetch_all(&self.pool)
            .await;
        rows.map_err(|error| self.error("list", error))?.iter().map(|row| self.summary(row)).collect()
    }

    fn summary(&self, row: &PgRow) -> Result<JobSummary, StoreError> {
        let priority = u8::try_from(row.get::<i16, _>("priority")).map_err(|error| error.to_string());
        let progress: Option<Value> = row.get("progress");
        Ok(JobSummary {
            job_id: row.get::<uuid::Uuid, _>("job_id").into(),
            state: self.parsed(OPERATION, "state", row)?,
            task: self.parsed(OPERATION, "task", row)?,
            document: row.get("document"),
            model: row.get("shown_model"),
            priority: priority
                .and_then(Priority::try_from)
                .map_err(|reason| self.corrupt(OPERATION, "priority", reason))?,
            attempt: attempt(row),
            enqueued_at: row.get("enqueued_at"),
            started_at: row.get("started_at"),
            finished_at: row.get("finished_at"),
            error: self.job_error(OPERATION, row)?,
            progress: progress.map(|progress| self.json(OPERATION, "progress", progress)).transpose()?,
            tokens_in: tokens(row, "tokens_in"),
            tokens_out: tokens(row, "tokens_out"),
        })
    }

    pub(super) async fn detail(&self, job: JobId) -> Result<Option<JobDetail>, StoreError> {
        let rows = self.rows_of("SELECT *, coalesce(served_by, model) AS shown_model FROM jobs WHERE job_id = $1", job);
        let rows = rows.await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(JobDetail {
            summary: self.summary(row)?,
            door: self.json(OPERATION, "door", row.get::<String, _>("door").into())?,
            origin: row.get("origin"),
            message: self.message(OPERATION, row)?,
            failures: failures(row),
            cancel_requested: row.get("cancel_requested"),
            documents: self.documents(job).await?,
            attempts: self.attempts(job).await?,
            result: self.result(job).await?,
        }))
    }

    async fn rows_of(&self, sql: &'static str, job: JobId) -> Result<Vec<PgRow>, StoreError> {
        let rows = sqlx::query(sql).bind(job.uuid()).fetch_all(&self.pool).await;
        rows.map_err(|error| self.error(OPERATION, error))
    }

    async fn documents(&self, job: JobId) -> Result<Vec<DocumentRecord>, StoreError> {
        let record = |row: &PgRow| {
            let digest: Option<&str> = row.get("digest");
            let digest: Option<Digest> = digest
                .map(str::parse)
                .transpose()
                .map_err(|reason: String| self.corrupt(OPERATION, "digest", reason))?;
            let facts = DocumentFacts {
                bytes: row.get::<Option<i64>, _>("bytes").map(i64::unsigned_abs),
                digest,
                version_id: row.get("version_id"),
                etag: row.get("etag"),
                media_type: row.get("media_type"),
                encoding: row.get("encoding"),
                tokens: tokens(row, "tokens"),
            };
            Ok(DocumentRecord { uri: row.get("uri"), facts })
        };
        let rows = self.rows_of("SELECT * FROM documents WHERE job_id = $1 ORDER BY position", job).await?;
        rows.iter().map(record).collect()
    }

    async fn attempts(&self, job: JobId) -> Result<Vec<AttemptRecord>, StoreError> {
        let record = |row: &PgRow| {
            Ok(AttemptRecord {
                attempt: attempt(row),
                worker: row.get("worker"),
                started_at: row.get("started_at"),
                ended_at: row.get("ended_at"),
                outcome: row.get("outcome"),
                error: self.job_error(OPERATION, row)?,
                stages: stage_times(row),
            })
        };
        let rows = self.rows_of("SELECT * FROM attempts WHERE job_id = $1 ORDER BY attempt", job).await?;
        rows.iter().map(record).collect()
    }

    async fn result(&self, job: JobId) -> Result<Option<JobResult>, StoreError> {
        let rows = self.rows_of("SELECT * FROM results WHERE job_id = $1", job).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(JobResult {
            text: row.get("text"),
            extraction: row.get("extraction"),
            tokens_in: tokens(row, "tokens_in").unwrap_or_default(),
            tokens_out: tokens(row, "tokens_out").unwrap_or_default(),
            stop: self.json(OPERATION, "stop", row.get::<String, _>("stop").into())?,
            model: row.get("model"),
            model_digest: row.get("model_digest"),
            device: row.get("device"),
            plan: self.json(OPERATION, "plan", row.get("plan"))?,
            flags: ResultFlags {
                approximate_attention: row.get("approximate_attention"),
                input_truncated: row.get("input_truncated"),
                overflow: self.json(OPERATION, "overflow", row.get::<String, _>("overflow").into())?,
                output_truncated: row.get("output_truncated"),
                schema_failed: row.get("schema_failed"),
                text_cleaned: row.get("text_cleaned"),
            },
        }))
    }

    pub(super) async fn report_rows(&self, view: ReportView, limit: u32) -> Result<ReportTable, StoreError> {
        let error = |error| self.error("report", error);
        let sql = format!("SELECT * FROM report_{} LIMIT {limit}", view.as_str());
        let rows = sqlx::query(AssertSqlSafe(sql.clone())).fetch_all(&self.pool).await.map_err(error)?;
        let names = |columns: &[sqlx::postgres::PgColumn]| columns.iter().map(|c| c.name().to_owned()).collect();
        let columns = match rows.first() {
            Some(row) => names(row.columns()),
            // Without rows only the statement knows them.
            None => {
                let statement = (&self.pool).prepare(sqlx::SqlSafeStr::into_sql_str(AssertSqlSafe(sql))).await;
                names(sqlx::Statement::columns(&statement.map_err(error)?))
            }
        };
        let rows = rows.iter().map(values).collect::<Result<_, _>>().map_err(error)?;
        Ok(ReportTable { columns, rows })
    }
}

fn values(row: &PgRow) -> Result<Vec<Value>, sqlx::Error> {
    (0..row.len()).map(|i| value(row, i)).collect()
}

/// A column of one of the types that the views have.
fn value(row: &PgRow, i: usize) -> Result<Value, sqlx::Error> {
    let raw = row.try_get_raw(i)?;
    if raw.is_null() {
        return Ok(Value::Null);
    }
    Ok(match raw.type_info().name() {
        "INT2" => json!(row.try_get::<i16, _>(i)?),
        "INT4" => json!(row.try_get::<i32, _>(i)?),
        "INT8" => json!(row.try_get::<i64, _>(i)?),
        "FLOAT8" => json!(row.try_get::<f64, _>(i)?),
        "BOOL" => json!(row.try_get::<bool, _>(i)?),
        "UUID" => json!(row.try_get::<uuid::Uuid, _>(i)?),
        "JSONB" => row.try_get(i)?,
        "TIMESTAMPTZ" => json!(row.try_get::<DateTime<Utc>, _>(i)?.to_rfc3339_opts(SecondsFormat::Secs, true)),
        _ => json!(row.try_get::<String, _>(i)?),
    })
}
