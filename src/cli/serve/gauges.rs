//! What the database alone knows of the backlog, looked at now and then for the metrics.
//!
//! Invariant: reads only. Every daemon at a database shows the same numbers; a database that does not answer leaves them as they were.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use crate::store::{Store, StoreError};
use crate::telemetry::metrics;

/// How often; as often as Prometheus usually looks.
const EVERY: Duration = Duration::from_secs(15);
/// Jobs that are counted at most, so that a large backlog costs no more than a glance.
const COUNT_AT_MOST: u64 = 100_000;

/// Looks until `over`.
pub(super) async fn sample(store: Arc<dyn Store>, over: impl Future<Output = ()>) {
    tokio::pin!(over);
    loop {
        if let Err(error) = look(&*store).await {
            // That it does not answer is said by those who need it.
            debug!(error.message = %error, "the backlog could not be looked at");
        }
        tokio::select! {
            () = &mut over => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

async fn look(store: &dyn Store) -> Result<(), StoreError> {
    let (waits, depth) = (store.waits().await?, store.inbox_depth(None, COUNT_AT_MOST).await?);
    metrics::INBOX.set(&["queued"], depth.queued);
    metrics::INBOX.set(&["running"], depth.running);
    let seconds = |wait: Option<Duration>| wait.unwrap_or_default().as_secs();
    metrics::JOB_WAIT.set(&[], seconds(waits.job));
    metrics::EVENT_WAIT.set(&[], seconds(waits.event));
    metrics::EVENTS_GIVEN_UP.set(&[], waits.events_given_up);
    Ok(())
}
