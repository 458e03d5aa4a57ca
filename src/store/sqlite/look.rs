//! What people see of the store: lists, one job in full, report views.
//!
//! Invariant: changes nothing.

use serde_json::{Value, json};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Column, Row, TypeInfo, ValueRef};

use super::rows::{stage_times, tokens};
use super::work::{attempt_columns, failures};
use super::{SqliteStore, now};
use crate::job::{Attempt, Digest, DocumentFacts, JobId, JobResult, OverflowHandling, Priority, ResultFlags};
use crate::store::{
    AttemptRecord, DocumentRecord, JobDetail, JobFilter, JobSummary, ReportTable, ReportView, StoreError, Waits,
};

/// `$1` and `$2` are JSON lists or NULL.
const LIST: &str = "SELECT j.*, coalesce(r.model, j.model) AS served_by FROM jobs j LEFT JOIN results r ON r.job_id = j.job_id \
                    WHERE ($1 IS NULL OR state IN (SELECT value FROM json_each($1))) AND ($2 IS NULL OR j.job_id IN (SELECT value FROM json_each($2))) \
                    ORDER BY enqueued_at DESC, j.rowid DESC LIMIT $3";

const OPERATION: &str = "show";

/// The wait since `available_at`, not since the enqueueing: a job that was replayed, or that a back-off held up, has not waited before.
const WAITS: &str = concat!(
    "SELECT (SELECT (",
    now!(),
    " - min(available_at)) / 1000.0 FROM jobs WHERE state = 'queued' AND available_at <= ",
    now!(),
    ") AS job, (SELECT (",
    now!(),
    " - min(j.finished_at)) / 1000.0 FROM jobs j JOIN (SELECT job_id FROM outbox WHERE given_up IS NULL ORDER BY available_at LIMIT 1000) AS o \
       USING (job_id)) AS event, (SELECT count(*) FROM (SELECT 1 FROM outbox WHERE given_up IS NOT NULL LIMIT 1000)) AS given_up"
);

impl SqliteStore {
    pub(super) async fn longest_waits(&self) -> Result<Waits, StoreError> {
        let row = sqlx::query(WAITS).fetch_one(&self.pool).await.map_err(|error| self.error("waits", error))?;
        Ok(Waits::of_seconds(row.get("job"), row.get("event"), row.get("given_up")))
    }

    pub(super) async fn summaries(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        let states = (!filter.states.is_empty()).then(|| json!(filter.states).to_string());
        let only = filter.only.as_ref().map(|jobs| json!(jobs).to_string());
        let rows = sqlx::query(LIST).bind(states).bind(only).bind(i64::from(filter.limit)).fetch_all(&self.pool).await;
        rows.map_err(|error| self.error("list", error))?.iter().map(|row| self.summary(row)).collect()
    }

    fn summary(&self, row: &SqliteRow) -> Result<JobSummary, StoreError> {
        let priority = u8::try_from(row.get::<i64, _>("priority")).map_err(|error| error.to_string());
        let priority = priority.and_then(|priority| Priority::try_from(priority).map_err(|error| error.to_string()));
        let progress: Option<String> = row.get("progress");
        Ok(JobSummary {
            job_id: self.parsed(OPERATION, "job_id", row.get("job_id"))?,
            state: self.parsed(OPERATION, "state", row.get("state"))?,
            task: self.parsed(OPERATION, "task", row.get("task"))?,
            document: row.get("document"),
            model: row.get("served_by"),
            priority: priority.map_err(|reason| self.corrupt(OPERATION, "priority", reason))?,
            attempt: Attempt::new(row.get::<i64, _>("attempt") as u32),
            enqueued_at: self.time(OPERATION, "enqueued_at", row.get("enqueued_at"))?,
            started_at: self.optional_time(OPERATION, "started_at", row)?,
            finished_at: self.optional_time(OPERATION, "finished_at", row)?,
            error: self.job_error(OPERATION, row)?,
            progress: progress.map(|progress| self.json(OPERATION, "progress", progress)).transpose()?,
            tokens_in: tokens(row, "tokens_in"),
            tokens_out: tokens(row, "tokens_out"),
        })
    }

    pub(super) async fn detail(&self, job: JobId) -> Result<Option<JobDetail>, StoreError> {
        let only = json!([job]).to_string();
        let row = sqlx::query(LIST).bind(None::<String>).bind(only).bind(1_i64).fetch_optional(&self.pool).await;
        let Some(row) = row.map_err(|error| self.error(OPERATION, error))? else { return Ok(None) };
        Ok(Some(JobDetail {
            summary: self.summary(&row)?,
            door: self.json(OPERATION, "door", json!(row.get::<String, _>("door")).to_string())?,
            origin: row.get("origin"),
            message: self.json(OPERATION, "message", row.get("message"))?,
            failures: failures(&row),
            cancel_requested: row.get("cancel_requested"),
            documents: self.documents(job).await?,
            attempts: self.attempts(job).await?,
            result: self.result(job).await?,
        }))
    }

    async fn rows_of(&self, sql: String, job: JobId) -> Result<Vec<SqliteRow>, StoreError> {
        let rows = sqlx::query(AssertSqlSafe(sql)).bind(job.to_string()).fetch_all(&self.pool).await;
        rows.map_err(|error| self.error(OPERATION, error))
    }

    async fn documents(&self, job: JobId) -> Result<Vec<DocumentRecord>, StoreError> {
        let rows = self.rows_of("SELECT * FROM documents WHERE job_id = $1 ORDER BY position".to_owned(), job).await?;
        let record = |row: &SqliteRow| {
            let digest: Option<String> = row.get("digest");
            let digest: Option<Digest> = digest.map(|digest| self.parsed(OPERATION, "digest", digest)).transpose()?;
            let facts = DocumentFacts {
                bytes: row.get::<Option<i64>, _>("bytes").map(|bytes| bytes as u64),
                digest,
                version_id: row.get("version_id"),
                etag: row.get("etag"),
                media_type: row.get("media_type"),
                encoding: row.get("encoding"),
                tokens: tokens(row, "tokens"),
            };
            Ok(DocumentRecord { uri: row.get("uri"), facts })
        };
        rows.iter().map(record).collect()
    }

    async fn attempts(&self, job: JobId) -> Result<Vec<AttemptRecord>, StoreError> {
        let sql = format!("SELECT {} FROM attempts WHERE job_id = $1 ORDER BY attempt", attempt_columns());
        let record = |row: &SqliteRow| {
            Ok(AttemptRecord {
                attempt: Attempt::new(row.get::<i64, _>("attempt") as u32),
                worker: row.get("worker"),
                started_at: self.time(OPERATION, "started_at", row.get("started_at"))?,
                ended_at: self.optional_time(OPERATION, "ended_at", row)?,
                outcome: row.get("outcome"),
                error: self.job_error(OPERATION, row)?,
                stages: stage_times(row),
            })
        };
        self.rows_of(sql, job).await?.iter().map(record).collect()
    }

    async fn result(&self, job: JobId) -> Result<Option<JobResult>, StoreError> {
        let rows = self.rows_of("SELECT * FROM results WHERE job_id = $1".to_owned(), job).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        let extraction: Option<String> = row.get("extraction");
        let overflow: String = row.get("overflow");
        let overflow: OverflowHandling = self.json(OPERATION, "overflow", json!(overflow).to_string())?;
        Ok(Some(JobResult {
            text: row.get("text"),
            extraction: extraction.map(|value| self.json(OPERATION, "extraction", value)).transpose()?,
            tokens_in: tokens(row, "tokens_in").unwrap_or_default(),
            tokens_out: tokens(row, "tokens_out").unwrap_or_default(),
            stop: self.json(OPERATION, "stop", json!(row.get::<String, _>("stop")).to_string())?,
            model: row.get("model"),
            model_digest: row.get("model_digest"),
            device: row.get("device"),
            plan: self.json(OPERATION, "plan", row.get("plan"))?,
            flags: ResultFlags {
                approximate_attention: row.get("approximate_attention"),
                input_truncated: row.get("input_truncated"),
                overflow,
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
        let columns = match rows.first() {
            Some(row) => row.columns().iter().map(|column| column.name().to_owned()).collect(),
            None => {
                let names = "SELECT name FROM pragma_table_info($1) ORDER BY cid";
                let view = format!("report_{}", view.as_str());
                sqlx::query_scalar(names).bind(view).fetch_all(&self.pool).await.map_err(error)?
            }
        };
        Ok(ReportTable { columns, rows: rows.iter().map(values).collect() })
    }
}

/// Every value of a row, by the type it has rather than the one its column was declared with.
fn values(row: &SqliteRow) -> Vec<Value> {
    let value = |i: usize| {
        let Ok(raw) = row.try_get_raw(i) else { return Value::Null };
        match raw.type_info().name() {
            "INTEGER" => json!(row.get::<i64, _>(i)),
            "REAL" => json!(row.get::<f64, _>(i)),
            "TEXT" => json!(row.get::<String, _>(i)),
            _ => Value::Null,
        }
    };
    (0..row.len()).map(value).collect()
}
