//! What inferences took, kept in the database, so that the next daemon predicts with it.
//!
//! Invariant: nothing waits for it; what the database does not take is lost, and would have changed little.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::warn;

use crate::cost::Observation;
use crate::store::Store;

/// Observations that wait to be written; more are dropped.
const WAITING: usize = 256;

/// Where observations come in.
pub(super) struct Observations(mpsc::Receiver<Observation>);

/// Takes an observation, and the place where they come in.
pub(super) fn channel() -> (impl Fn(Observation) + Send + Sync + 'static, Observations) {
    let (sender, observations) = mpsc::channel(WAITING);
    let observed = move |observation| {
        let _ = sender.try_send(observation);
    };
    (observed, Observations(observations))
}

impl Observations {
    /// Writes until `over`, and then what has come until then.
    pub async fn keep(mut self, store: Arc<dyn Store>, over: impl Future<Output = ()>) {
        tokio::pin!(over);
        loop {
            let observation = tokio::select! {
                observation = self.0.recv() => observation,
                () = &mut over => self.0.try_recv().ok(),
            };
            let Some(observation) = observation else { return };
            if let Err(error) = store.cost_observe(&observation).await {
                warn!(error.message = %error, "what an inference took is not kept");
            }
        }
    }
}
