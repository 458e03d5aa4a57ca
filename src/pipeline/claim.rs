//! The first hand: takes jobs from the store, one when there is room for it, and makes them ready for the engine.
//!
//! Invariant: nothing is claimed that could not be passed on at once, and nothing at all once the drain has begun.

use std::time::Duration;

use tokio::sync::mpsc;

use super::events::Event;
use super::infer::{Ended, Ready};
use super::shutdown::{Phase, Shutdown};
use super::work::{Interrupt, Work};
use super::{Pipeline, PipelineError};
use crate::engine::InferRequest;
use crate::failpoint;
use crate::job::JobError;
use crate::store::{Claim, ClaimRequest, JobFilter, JobState, StoreError};

/// Wait before a store is asked again that did not answer: doubled each time, up to the second.
const STORE_WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

impl Pipeline {
    /// Claims and prepares until there is nothing left to do or the drain begins.
    pub(super) async fn claim_and_prepare(
        &self,
        ready: mpsc::Sender<Ready>,
        ended: mpsc::Sender<Ended>,
        shutdown: Shutdown,
    ) -> Result<(), PipelineError> {
        loop {
            let room = tokio::select! {
                () = shutdown.draining() => return Ok(()),
                room = ready.reserve() => room.map_err(|_| PipelineError::EngineGone)?,
            };
            let Some(claim) = self.next(&shutdown, &ready).await? else { return Ok(()) };
            failpoint::reach("claim.committed");
            let mut work = self.held.hold(claim);
            self.parts.events.event(Event::Claimed { job: &work.claim.job, lease: work.held.lease });
            match self.prepare_unless_called_off(&mut work, &shutdown).await {
                Ok(request) => {
                    failpoint::reach("claim.prepared");
                    room.send(Ready::new(work, request));
                }
                Err(error) => {
                    let unsent = ended.send(Ended { work, result: Err(error) }).await;
                    unsent.map_err(|_| PipelineError::EngineGone)?;
                }
            }
        }
    }

    /// A document that comes slowly must not hold up a stop or a cancel; reading it is dropped where it stands.
    async fn prepare_unless_called_off(&self, work: &mut Work, shutdown: &Shutdown) -> Result<InferRequest, JobError> {
        let held = work.held.clone();
        tokio::select! {
            prepared = self.prepare(work) => prepared,
            () = shutdown.draining() => {
                held.interrupt(Interrupt::Shutdown);
                Err(held.interrupted().unwrap_or(Interrupt::Shutdown).error())
            }
            why = held.called_off() => Err(why.error()),
        }
    }

    /// The next job; nothing if all have ended, the drain has begun or there is nobody left to take it.
    async fn next(&self, shutdown: &Shutdown, ready: &mpsc::Sender<Ready>) -> Result<Option<Claim>, PipelineError> {
        let settings = &self.settings;
        let request = ClaimRequest {
            worker: settings.worker.clone(),
            limit: 1,
            lease: settings.lease,
            models: settings.models.clone(),
            max_bytes: settings.claim_at_most_bytes,
            only: settings.only.clone(),
        };
        let mut wait = Wait::default();
        while shutdown.phase() == Phase::Working && !ready.is_closed() {
            // What is claimed while no engine can be had would only be held, and handed back.
            if !self.parts.engine.is_ready() {
                tokio::select! {
                    () = shutdown.draining() => return Ok(None),
                    () = tokio::time::sleep(settings.poll) => continue,
                }
            }
            let pause = match self.claim_one(&request).await {
                Ok(Some(claim)) => return Ok(Some(claim)),
                Ok(None) if self.is_over().await? => return Ok(None),
                Ok(None) => {
                    wait = Wait::default();
                    settings.poll
                }
                Err(error) => wait.after("claim", error, self)?,
            };
            tokio::select! {
                () = shutdown.draining() => return Ok(None),
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(None)
    }

    async fn claim_one(&self, request: &ClaimRequest) -> Result<Option<Claim>, StoreError> {
        Ok(self.parts.store.claim(request).await?.pop())
    }

    /// Whether all jobs of `only` have ended; never so without such a list.
    async fn is_over(&self) -> Result<bool, PipelineError> {
        let Some(only) = &self.settings.only else { return Ok(false) };
        if !self.held.is_empty() {
            return Ok(false);
        }
        let states = vec![JobState::Queued, JobState::Running];
        let filter = JobFilter { states, only: Some(only.clone()), limit: 1 };
        match self.parts.store.list(&filter).await {
            Ok(unfinished) => Ok(unfinished.is_empty()),
            Err(error) if error.is_transient() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Growing waits for a store that does not answer.
pub(super) struct Wait(Duration);

impl Default for Wait {
    fn default() -> Self {
        Self(STORE_WAIT.0)
    }
}

impl Wait {
    /// How long to wait after `error`; the error itself if waiting does not help.
    pub fn after(
        &mut self,
        operation: &'static str,
        error: StoreError,
        pipeline: &Pipeline,
    ) -> Result<Duration, PipelineError> {
        if !error.is_transient() {
            return Err(error.into());
        }
        let reason = error.to_string();
        pipeline.parts.events.event(Event::StoreUnavailable { operation, reason: &reason });
        let wait = self.0;
        self.0 = (wait * 2).min(STORE_WAIT.1);
        Ok(wait)
    }
}
