//! Columns to values and back.
//!
//! Invariant: a column that does not hold what this program writes is an error that names it, never a default.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use crate::job::{ErrorCode, Job, JobError, JobMessage, MessageLimits, Stage, StageTimes, TokenCount};
use crate::store::StoreError;

/// Columns of the stages' times, in their order.
pub(super) const STAGE_COLUMNS: &str = "queue_ms, fetch_ms, decode_ms, tokenize_ms, prefill_ms, generate_ms, record_ms";

impl SqliteStore {
    pub(super) fn parsed<T>(&self, operation: &'static str, column: &'static str, text: String) -> Result<T, StoreError>
    where
        T: FromStr<Err: Display>,
    {
        text.parse().map_err(|reason| self.corrupt(operation, column, reason))
    }

    pub(super) fn json<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        column: &'static str,
        text: String,
    ) -> Result<T, StoreError> {
        serde_json::from_str(&text).map_err(|reason| self.corrupt(operation, column, reason))
    }

    /// The job of a stored message. It passed the checks of the limits that were in force when it came.
    pub(super) fn job(&self, operation: &'static str, message: String) -> Result<Job, StoreError> {
        let message: JobMessage = self.json(operation, "message", message)?;
        message.check(None, &MessageLimits::unbounded()).map_err(|reason| self.corrupt(operation, "message", reason))
    }

    pub(super) fn time(
        &self,
        operation: &'static str,
        column: &'static str,
        millis: i64,
    ) -> Result<DateTime<Utc>, StoreError> {
        DateTime::from_timestamp_millis(millis)
            .ok_or_else(|| self.corrupt(operation, column, format!("{millis} is no time")))
    }

    pub(super) fn optional_time(
        &self,
        operation: &'static str,
        column: &'static str,
        row: &SqliteRow,
    ) -> Result<Option<DateTime<Utc>>, StoreError> {
        row.get::<Option<i64>, _>(column).map(|millis| self.time(operation, column, millis)).transpose()
    }

    /// From `error_code` and `error_message`.
    pub(super) fn job_error(&self, operation: &'static str, row: &SqliteRow) -> Result<Option<JobError>, StoreError> {
        let Some(code) = row.get::<Option<String>, _>("error_code") else { return Ok(None) };
        let code: ErrorCode = self.parsed(operation, "error_code", code)?;
        Ok(Some(JobError::new(code, row.get::<Option<String>, _>("error_message").unwrap_or_default())))
    }
}

pub(super) fn tokens(row: &SqliteRow, column: &str) -> Option<TokenCount> {
    row.get::<Option<i64>, _>(column).map(|count| TokenCount(count as u64))
}

pub(super) fn milliseconds(stages: &StageTimes, stage: Stage) -> Option<f64> {
    stages.get(stage).map(|time| time.as_secs_f64() * 1000.0)
}

pub(super) fn stage_times(row: &SqliteRow) -> StageTimes {
    let mut times = StageTimes::default();
    for stage in Stage::ALL {
        let column = format!("{}_ms", stage.as_str());
        if let Some(ms) = row.get::<Option<f64>, _>(column.as_str()) {
            times.add(stage, Duration::from_secs_f64(ms.max(0.0) / 1000.0));
        }
    }
    times
}
