//! Results that are also to be written as files.
//!
//! Invariant: in the transaction that ends a job it is noted for every place that wants results; it stays noted until it was written there.

use std::time::Duration;

use async_trait::async_trait;

use super::StoreError;
use crate::job::{Attempt, JobId};

/// For so long after a daemon last spoke for a place jobs are noted for it; then nobody seems to want them any more.
pub(super) const WANTED_FOR: Duration = Duration::from_secs(7 * 24 * 3600);

/// A job that has ended and is to be written to a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// The job.
    pub job: JobId,
    /// The attempt it ended with.
    pub attempt: Attempt,
}

/// Results on their way to files.
#[async_trait]
pub trait ExportStore: Send + Sync {
    /// From now on jobs that end are noted for `place`. Said again now and then by every daemon that writes there.
    async fn export_want(&self, place: &str) -> Result<(), StoreError>;

    /// Up to `limit` jobs that nobody else is writing there, hidden from others for `lease`.
    async fn export_take(&self, place: &str, limit: u32, lease: Duration) -> Result<Vec<Export>, StoreError>;

    /// This one is written; a later ending of the same job stays noted.
    async fn export_done(&self, place: &str, export: Export) -> Result<(), StoreError>;
}
