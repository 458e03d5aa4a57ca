//! What an attempt leaves behind, as it is written here; see [`Finish`].

use sqlx::{Sqlite, Transaction};

use super::rows::milliseconds;
use super::{SqliteStore, now};
use crate::job::retry::FailureCounter;
use crate::job::{JobResult, Stage};
use crate::store::finish::Finish;
use crate::store::{AttemptReport, Ending, JobState, Lease, StoreError, event, name_of};

/// Only the attempt that is the job's own, while it runs. `$4` is the wait before the job can be claimed again.
const END: &str = concat!(
    "UPDATE jobs SET state = CASE WHEN $3 = 'queued' AND cancel_requested THEN 'cancelled' ELSE $3 END, available_at = ",
    now!(),
    " + $4, finished_at = CASE WHEN $3 = 'queued' AND NOT cancel_requested THEN NULL ELSE ",
    now!(),
    " END, worker = NULL, lease_until = NULL, progress = NULL, suspect_failures = suspect_failures + $5, infra_failures = infra_failures + $6, ",
    "error_code = $7, error_message = $8, tokens_in = coalesce($9, tokens_in), tokens_out = coalesce($10, tokens_out) ",
    "WHERE job_id = $1 AND attempt = $2 AND state = 'running' RETURNING state"
);

const END_WAITING: &str = concat!(
    "UPDATE jobs SET state = $3, finished_at = ",
    now!(),
    ", error_code = $4, error_message = $5 WHERE job_id = $1 AND attempt = $2 AND state = 'queued'"
);

const END_ATTEMPT: &str = concat!(
    "UPDATE attempts SET ended_at = ",
    now!(),
    ", outcome = $3, error_code = $4, error_message = $5, queue_ms = $6, fetch_ms = $7, decode_ms = $8, tokenize_ms = $9, prefill_ms = $10, ",
    "generate_ms = $11, record_ms = $12 WHERE job_id = $1 AND attempt = $2"
);

const DOCUMENT: &str = "UPDATE documents SET bytes = $3, digest = $4, version_id = $5, etag = $6, media_type = $7, encoding = $8, tokens = $9 \
                        WHERE job_id = $1 AND position = $2";

const RESULT: &str = "INSERT OR REPLACE INTO results (job_id, attempt, text, extraction, tokens_in, tokens_out, stop, model, model_digest, device, plan, \
                      approximate_attention, input_truncated, overflow, output_truncated, schema_failed, text_cleaned) \
                      VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)";

const EVENT: &str = concat!(
    "INSERT INTO outbox (event_id, job_id, target, correlation_id, body, available_at) SELECT $2, job_id, reply_target, reply_correlation, $3, ",
    now!(),
    " FROM jobs WHERE job_id = $1 AND reply_target IS NOT NULL ON CONFLICT DO NOTHING"
);

impl Finish for SqliteStore {
    type Transaction = Transaction<'static, Sqlite>;

    async fn end_job(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<Option<JobState>, StoreError> {
        let (wait, counter) = ending.consequences();
        let (error, result) = (ending.error(), ending.result());
        let state: Option<String> = sqlx::query_scalar(END)
            .bind(lease.job.to_string())
            .bind(i64::from(lease.attempt.get()))
            .bind(ending.state().as_str())
            .bind(wait.as_millis() as i64)
            .bind(i64::from(counter == Some(FailureCounter::Suspect)))
            .bind(i64::from(counter == Some(FailureCounter::Infra)))
            .bind(error.map(|error| error.code.as_str()))
            .bind(error.map(|error| error.message.as_str()))
            .bind(result.map(|result| result.tokens_in.0 as i64))
            .bind(result.map(|result| result.tokens_out.0 as i64))
            .fetch_optional(&mut **transaction)
            .await
            .map_err(|error| self.error("finish", error))?;
        state.map(|state| self.parsed("finish", "state", state)).transpose()
    }

    async fn end_waiting_job(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<(), StoreError> {
        let error = ending.error();
        sqlx::query(END_WAITING)
            .bind(lease.job.to_string())
            .bind(i64::from(lease.attempt.get()))
            .bind(ending.state().as_str())
            .bind(error.map(|error| error.code.as_str()))
            .bind(error.map(|error| error.message.as_str()))
            .execute(&mut **transaction)
            .await
            .map(drop)
            .map_err(|error| self.error("end_waiting", error))
    }

    async fn write_attempt(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
        outcome: &str,
    ) -> Result<(), StoreError> {
        let error = report.ending.error();
        let mut query = sqlx::query(END_ATTEMPT)
            .bind(lease.job.to_string())
            .bind(i64::from(lease.attempt.get()))
            .bind(outcome)
            .bind(error.map(|error| error.code.as_str()))
            .bind(error.map(|error| error.message.as_str()));
        for stage in Stage::ALL {
            query = query.bind(milliseconds(&report.stages, stage));
        }
        query.execute(&mut **transaction).await.map(drop).map_err(|error| self.error("finish", error))
    }

    async fn write_documents(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
    ) -> Result<(), StoreError> {
        for (position, facts) in report.documents.iter().enumerate() {
            sqlx::query(DOCUMENT)
                .bind(lease.job.to_string())
                .bind(position as i64)
                .bind(facts.bytes.map(|bytes| bytes as i64))
                .bind(facts.digest.map(|digest| digest.to_string()))
                .bind(&facts.version_id)
                .bind(&facts.etag)
                .bind(&facts.media_type)
                .bind(&facts.encoding)
                .bind(facts.tokens.map(|tokens| tokens.0 as i64))
                .execute(&mut **transaction)
                .await
                .map_err(|error| self.error("finish", error))?;
        }
        Ok(())
    }

    async fn write_result(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        result: &JobResult,
    ) -> Result<(), StoreError> {
        let flags = &result.flags;
        let plan = serde_json::to_string(&result.plan).map_err(|error| self.corrupt("finish", "plan", error))?;
        sqlx::query(RESULT)
            .bind(lease.job.to_string())
            .bind(i64::from(lease.attempt.get()))
            .bind(&result.text)
            .bind(result.extraction.as_ref().map(|extraction| extraction.to_string()))
            .bind(result.tokens_in.0 as i64)
            .bind(result.tokens_out.0 as i64)
            .bind(name_of(&result.stop))
            .bind(&result.model)
            .bind(&result.model_digest)
            .bind(&result.device)
            .bind(plan)
            .bind(flags.approximate_attention)
            .bind(flags.input_truncated)
            .bind(flags.overflow.as_str())
            .bind(flags.output_truncated)
            .bind(flags.schema_failed)
            .bind(flags.text_cleaned)
            .execute(&mut **transaction)
            .await
            .map(drop)
            .map_err(|error| self.error("finish", error))
    }

    async fn write_event(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<(), StoreError> {
        let Some(body) = event::body(lease, ending) else { return Ok(()) };
        self.note_exports(transaction, lease).await?;
        let query = sqlx::query(EVENT).bind(lease.job.to_string()).bind(lease.job.event_id(lease.attempt).to_string());
        query
            .bind(body.to_string())
            .execute(&mut **transaction)
            .await
            .map(drop)
            .map_err(|error| self.error("finish", error))
    }
}
