//! Columns to values and back.
//!
//! Invariant: a column that does not hold what this program writes is an error that names it, never a default; text that
//! goes in has no character PostgreSQL can not hold.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::postgres::types::PgInterval;

use super::PostgresStore;
use crate::job::retry::Failures;
use crate::job::{Attempt, ErrorCode, Job, JobError, JobMessage, MessageLimits, Stage, StageTimes, TokenCount};
use crate::store::{Lease, StoreError};

impl PostgresStore {
    pub(super) fn parsed<T>(&self, operation: &'static str, column: &'static str, row: &PgRow) -> Result<T, StoreError>
    where
        T: FromStr<Err: Display>,
    {
        row.get::<&str, _>(column).parse().map_err(|reason| self.corrupt(operation, column, reason))
    }

    pub(super) fn json<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        column: &'static str,
        value: Value,
    ) -> Result<T, StoreError> {
        serde_json::from_value(value).map_err(|reason| self.corrupt(operation, column, reason))
    }

    pub(super) fn message(&self, operation: &'static str, row: &PgRow) -> Result<JobMessage, StoreError> {
        let message: &str = row.get("message");
        serde_json::from_str(message).map_err(|reason| self.corrupt(operation, "message", reason))
    }

    /// The job of a stored message. It passed the checks of the limits that were in force when it came.
    pub(super) fn job(&self, operation: &'static str, row: &PgRow) -> Result<Job, StoreError> {
        let checked = self.message(operation, row)?.check(None, &MessageLimits::unbounded());
        checked.map_err(|reason| self.corrupt(operation, "message", reason))
    }

    /// From `error_code` and `error_message`.
    pub(super) fn job_error(&self, operation: &'static str, row: &PgRow) -> Result<Option<JobError>, StoreError> {
        let Some(code) = row.get::<Option<&str>, _>("error_code") else { return Ok(None) };
        let code: ErrorCode = code.parse().map_err(|reason: String| self.corrupt(operation, "error_code", reason))?;
        Ok(Some(JobError::new(code, row.get::<Option<&str>, _>("error_message").unwrap_or_default())))
    }
}

pub(super) fn lease(row: &PgRow) -> Lease {
    Lease { job: row.get::<uuid::Uuid, _>("job_id").into(), attempt: attempt(row) }
}

pub(super) fn attempt(row: &PgRow) -> Attempt {
    Attempt::new(row.get::<i32, _>("attempt").unsigned_abs())
}

pub(super) fn failures(row: &PgRow) -> Failures {
    let count = |column: &str| row.get::<i32, _>(column).unsigned_abs();
    Failures { suspect: count("suspect_failures"), infra: count("infra_failures") }
}

pub(super) fn tokens(row: &PgRow, column: &str) -> Option<TokenCount> {
    row.get::<Option<i64>, _>(column).map(|count| TokenCount(count.unsigned_abs()))
}

pub(super) fn stage_times(row: &PgRow) -> StageTimes {
    let mut times = StageTimes::default();
    for stage in Stage::ALL {
        let column = format!("{}_ms", stage.as_str());
        if let Some(ms) = row.get::<Option<f64>, _>(column.as_str()) {
            times.add(stage, Duration::from_secs_f64(ms.max(0.0) / 1000.0));
        }
    }
    times
}

/// A span as the database's clock adds it. More than a century is a century.
pub(super) fn interval(span: Duration) -> PgInterval {
    let century = Duration::from_secs(100 * 366 * 86_400);
    PgInterval { months: 0, days: 0, microseconds: span.min(century).as_micros() as i64 }
}
