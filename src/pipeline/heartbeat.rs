//! Signs of life for all held jobs, and what they bring back: cancels, lost leases. Sweeps up after dead workers on the way.
//!
//! Between two beats it is asked what was cancelled, so that a cancel reaches a running job soon, however long the lease is.
//!
//! Invariant: three beats fit into a lease, so that one lost beat loses no job. Nobody sweeps before the store has answered for a whole
//! lease: after an outage every lease has run out, and those who live renew theirs first.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Pipeline;
use super::events::Event;
use super::work::{Held, Interrupt};
use crate::store::{Beat, Lease, LeaseState, StoreError};

/// Beats in a row that were answered in time before a sweep.
const SWEEP_AFTER: u32 = 3;
/// How often it is asked what was cancelled: a person who cancels should not wait, and the engine stops within a layer or a token.
const CANCELS_EVERY: Duration = Duration::from_millis(500);

impl Pipeline {
    /// Beats until `over`.
    pub(super) async fn beat(self: Arc<Self>, over: CancellationToken) {
        let interval = self.settings.lease / 3;
        let mut answered = 0;
        loop {
            tokio::select! {
                () = over.cancelled() => return,
                () = self.hear_cancels(Instant::now() + interval) => {}
            }
            let asked = Instant::now();
            // A store that does not answer now may do so before the leases have run out.
            let renewed = self.renew().await;
            answered = if renewed.is_ok() && asked.elapsed() <= interval { answered + 1 } else { 0 };
            if let Err(error) = renewed {
                warn!(error.kind = "heartbeat", error.message = %error, "leases not renewed");
            }
            if answered >= SWEEP_AFTER {
                answered = 0;
                match self.parts.store.sweep().await {
                    Ok(swept) => self.parts.events.event(Event::Swept { swept }),
                    Err(error) => warn!(error.kind = "sweep", error.message = %error, "expired leases not swept"),
                }
            }
        }
    }

    /// Passes cancels on until the next beat. A store that does not answer must not delay that.
    async fn hear_cancels(&self, next_beat: Instant) {
        loop {
            tokio::time::sleep_until(next_beat.min(Instant::now() + CANCELS_EVERY)).await;
            if Instant::now() >= next_beat {
                return;
            }
            let held = self.held.all();
            if held.is_empty() {
                continue;
            }
            let leases: Vec<Lease> = held.iter().map(|held| held.lease).collect();
            match tokio::time::timeout_at(next_beat, self.parts.store.cancels(&leases)).await {
                Ok(Ok(cancelled)) => {
                    let called_off = held.iter().filter(|held| cancelled.contains(&held.lease));
                    called_off.for_each(|held| held.interrupt(Interrupt::Cancelled));
                }
                // The beats say so loudly enough.
                Ok(Err(error)) => debug!(error.message = %error, "cancels could not be looked for"),
                Err(_) => return,
            }
        }
    }

    /// Asks also when nothing is held: whether the store answers decides on the next sweep.
    async fn renew(&self) -> Result<(), StoreError> {
        let held = self.held.all();
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
