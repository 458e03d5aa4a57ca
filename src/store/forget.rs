//! Forgetting what ended long ago.
//!
//! Invariant: a job goes with all that hangs on it or stays with all of it. What the reports have summed up stays (PostgreSQL; on SQLite they count the jobs that are there).

use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;

use super::StoreError;

/// What hangs on a job, and the job after it.
pub(super) const TABLES: [&str; 6] = ["results", "attempts", "documents", "outbox", "exports", "jobs"];

/// How much was forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Forgotten {
    /// Jobs.
    pub jobs: u64,
    /// Messages and objects that were no jobs.
    pub rejections: u64,
}

/// What a store knows of the past.
#[async_trait]
pub trait ForgetStore: Send + Sync {
    /// Deletes up to `limit` jobs that succeeded, failed or were cancelled, and as many rejections, longer than `age` ago, in one transaction. Dead jobs
    /// stay, since a person has to look at them; so do jobs whose completion event, result file or disposal of a dropped file is still to come. A job that
    /// was forgotten is new when it is enqueued again.
    async fn forget(&self, age: Duration, limit: u32) -> Result<Forgotten, StoreError>;
}
