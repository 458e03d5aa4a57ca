//! Signs of life for all held jobs, and what they bring back: cancels, lost leases. Sweeps up after dead workers on the way.
//!
//! Invariant: three beats fit into a lease, so that one lost beat loses no job.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Pipeline;
use super::work::{Held, Interrupt};
use crate::store::{Beat, LeaseState, StoreError};

/// Beats between two sweeps.
const SWEEP_EVERY: u64 = 3;

impl Pipeline {
    /// Beats until `over`.
    pub(super) async fn beat(self: Arc<Self>, over: CancellationToken) {
        for beat in 1_u64.. {
            tokio::select! {
                () = over.cancelled() => return,
                () = tokio::time::sleep(self.settings.lease / 3) => {}
            }
            // A store that does not answer now may do so before the leases have run out.
            if let Err(error) = self.renew().await {
                warn!(error.kind = "heartbeat", error.message = %error, "leases not renewed");
            }
            if beat % SWEEP_EVERY == 0
                && let Err(error) = self.parts.store.sweep().await
            {
                warn!(error.kind = "sweep", error.message = %error, "expired leases not swept");
            }
        }
    }

    async fn renew(&self) -> Result<(), StoreError> {
        let held = self.held.all();
        if held.is_empty() {
            return Ok(());
        }
        let beats: Vec<Beat> = held.iter().map(|held| Beat { lease: held.lease, progress: held.progress() }).collect();
        let states = self.parts.store.heartbeat(&self.settings.worker, self.settings.lease, &beats).await?;
        held.iter().zip(states).for_each(|(held, state)| tell(held, state));
        Ok(())
    }
}

fn tell(held: &Held, state: LeaseState) {
    match state {
        LeaseState::Held => {}
        LeaseState::CancelRequested => held.interrupt(Interrupt::Cancelled),
        LeaseState::Lost => held.interrupt(Interrupt::LeaseLost),
    }
}
