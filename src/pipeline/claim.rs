//! The first hand: takes jobs from the store, as many in one claim as there is room for, and makes them ready for the engine side by side.
//!
//! Invariant: nothing is claimed that has no place before the engine, and nothing at all once the drain has begun. A document that comes
//! slowly holds up no other job.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, Stream, StreamExt};
use tokio::sync::mpsc::{self, OwnedPermit};

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
        let mut preparing = FuturesUnordered::new();
        loop {
            let Some(places) = meanwhile(&mut preparing, places(&ready, &shutdown)).await?? else { break };
            let claims = meanwhile(&mut preparing, self.next(places.len(), &shutdown, &ready)).await??;
            if claims.is_empty() {
                break;
            }
            failpoint::reach("claim.committed");
            // Every claimed job gets its heartbeat from now on, whichever is prepared first.
            for (claim, place) in claims.into_iter().zip(places) {
                preparing.push(self.make_ready(self.held.hold(claim), place, &ended, &shutdown));
            }
        }
        while let Some(passed_on) = preparing.next().await {
            passed_on?;
        }
        Ok(())
    }

    /// Prepares a job and passes it on: to the engine, or with what is wrong with it to the recorder.
    async fn make_ready(
        &self,
        mut work: Work,
        place: OwnedPermit<Ready>,
        ended: &mpsc::Sender<Ended>,
        shutdown: &Shutdown,
    ) -> Result<(), PipelineError> {
        self.parts.events.event(Event::Claimed { job: &work.claim.job, lease: work.held.lease });
        match self.prepare_unless_called_off(&mut work, shutdown).await {
            Ok(request) => {
                failpoint::reach("claim.prepared");
                place.send(Ready::new(work, request));
                Ok(())
            }
            Err(error) => {
                drop(place);
                ended.send(Ended { work, result: Err(error) }).await.map_err(|_| PipelineError::EngineGone)
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

    /// The next jobs, `limit` at most; none if all have ended, the drain has begun or there is nobody left to take them.
    async fn next(
        &self,
        limit: usize,
        shutdown: &Shutdown,
        ready: &mpsc::Sender<Ready>,
    ) -> Result<Vec<Claim>, PipelineError> {
        let settings = &self.settings;
        let request = ClaimRequest {
            worker: settings.worker.clone(),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
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
                    () = shutdown.draining() => return Ok(Vec::new()),
                    () = tokio::time::sleep(settings.poll) => continue,
                }
            }
            let pause = match self.parts.store.claim(&request).await {
                Ok(claims) if !claims.is_empty() => return Ok(claims),
                Ok(_) if self.is_over().await? => return Ok(Vec::new()),
                Ok(_) => {
                    wait = Wait::default();
                    settings.poll
                }
                Err(error) => wait.after("claim", error, self)?,
            };
            tokio::select! {
                () = shutdown.draining() => return Ok(Vec::new()),
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(Vec::new())
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

/// The places that are free before the engine, at least one; none once the drain has begun.
async fn places(
    ready: &mpsc::Sender<Ready>,
    shutdown: &Shutdown,
) -> Result<Option<Vec<OwnedPermit<Ready>>>, PipelineError> {
    let first = tokio::select! {
        () = shutdown.draining() => return Ok(None),
        place = ready.clone().reserve_owned() => place.map_err(|_| PipelineError::EngineGone)?,
    };
    let others = std::iter::from_fn(|| ready.clone().try_reserve_owned().ok());
    Ok(Some(std::iter::once(first).chain(others).collect()))
}

/// What `future` gives, while the jobs that are being prepared go on.
async fn meanwhile<T>(
    preparing: &mut (impl Stream<Item = Result<(), PipelineError>> + Unpin),
    future: impl Future<Output = T>,
) -> Result<T, PipelineError> {
    let mut future = pin!(future);
    loop {
        tokio::select! {
            given = &mut future => return Ok(given),
            Some(passed_on) = preparing.next() => passed_on?,
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
