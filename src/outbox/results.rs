//! Results as JSON files: below a prefix of an object store, or in a folder.
//!
//! Invariant: a file is written after its job's end is committed, under a name that follows from the job alone; written again it says the
//! same, so it is written at least once and repetition is harmless.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tracing::warn;

use crate::failpoint;
use crate::job::DocumentUri;
use crate::objects::{ObjectClient, ObjectError};
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::store::{Export, JobDetail, Store, StoreError};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// Results taken at once.
const BATCH: u32 = 50;
/// How long taken ones stay hidden from other daemons; one that could not be written is tried again after it.
const LEASE: Duration = Duration::from_secs(30);

/// Writes results.
pub struct ResultWriter {
    /// Prefix (ends with `/`) or folder.
    pub to: DocumentUri,
    /// Clients of the configured stores.
    pub stores: Vec<ObjectClient>,
    /// Where results come from.
    pub store: Arc<dyn Store>,
    /// How often to look for new ones.
    pub poll: Duration,
    /// Where its state is reported.
    pub health: Component,
}

/// Why a round ended early.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Objects(#[from] ObjectError),
    #[error("{place}: {source}")]
    File { place: String, source: io::Error },
    #[error("no store is named {0}")]
    NoStore(String),
}

impl ResultWriter {
    /// Writes until the drain is over: after `flushed` resolves, what is there by then is written in one more round.
    pub async fn run(self, flushed: impl Future<Output = ()>, shutdown: Shutdown) {
        tokio::pin!(flushed);
        loop {
            self.round().await;
            tokio::select! {
                biased;
                () = &mut flushed => break,
                () = tokio::time::sleep(self.poll) => {}
            }
        }
        if shutdown.phase() != Phase::Stopping {
            self.round().await;
        }
    }

    async fn round(&self) {
        match self.write_all().await {
            Ok(()) => self.health.ready(),
            Err(broken) => {
                warn!(results.place = %self.to, error.message = %broken, "results wait to be written");
                self.health.degraded(&broken.to_string());
            }
        }
    }

    async fn write_all(&self) -> Result<(), Broken> {
        let place = self.to.to_string();
        self.store.export_want(&place).await?;
        loop {
            let exports = self.store.export_take(&place, BATCH, LEASE).await?;
            if exports.is_empty() {
                return Ok(());
            }
            for export in exports {
                self.write(&place, export).await?;
            }
        }
    }

    async fn write(&self, place: &str, export: Export) -> Result<(), Broken> {
        // One that was queued again meanwhile is noted again when it ends.
        let detail = self.store.show(export.job).await?.filter(|detail| detail.summary.state.is_final());
        if let Some(detail) = detail {
            self.put(&format!("{}.json", export.job), document(&detail).to_string().into_bytes()).await?;
            failpoint::reach("results.written");
            metrics::RESULTS_WRITTEN.add(&[], 1);
        }
        Ok(self.store.export_done(place, export).await?)
    }

    async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), Broken> {
        match &self.to {
            DocumentUri::S3 { store, bucket, key } => {
                let client = self.stores.iter().find(|client| client.alias() == store);
                let client = client.ok_or_else(|| Broken::NoStore(store.clone()))?;
                Ok(client.put(bucket, &format!("{key}{name}"), "application/json", bytes).await?)
            }
            DocumentUri::File { path } => {
                let (folder, name) = (path.clone(), name.to_owned());
                let failed = |source: io::Error| Broken::File { place: path.display().to_string(), source };
                let writing = tokio::task::spawn_blocking(move || replace(&folder, &name, &bytes));
                writing.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)
            }
        }
    }
}

/// Readers see the whole file or none. Of two daemons that write the same result each has a name of its own until it is whole.
fn replace(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let part = folder.join(format!(".{name}.{}.part", std::process::id()));
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, folder.join(name))?;
    // The name is on disk with its folder.
    File::open(folder)?.sync_all()
}

/// Part of the interface to users: version 1 of the form of result files.
fn document(detail: &JobDetail) -> Value {
    let summary = &detail.summary;
    json!({
        "version": 1,
        "job_id": summary.job_id,
        "state": summary.state,
        "task": summary.task,
        "attempt": summary.attempt,
        "documents": detail.documents,
        "labels": detail.message.labels,
        "enqueued_at": summary.enqueued_at,
        "finished_at": summary.finished_at,
        "result": detail.result,
        "error": summary.error,
    })
}
