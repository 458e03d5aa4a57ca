//! The first hand: takes jobs from the store, as many in one claim as there is room for, and makes them ready for the engine at the same time.
//!
//! Invariant: nothing is claimed that could not be passed on at once, and nothing at all once the drain has begun.

use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::sync::mpsc;

use super::events::Event;
use super::infer::{Ended, Ready};
use super::shutdown::{Phase, Shutdown};
use super::work::Work;
use super::{Pipeline, PipelineError};
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
            // Nobody else sends: what is free now is free until it is filled from here.
            drop(room);
            let claims = self.next(ready.capacity(), &shutdown, &ready).await?;
            if claims.is_empty() {
                return Ok(());
            }
            // Every claimed job gets its heartbeat from now on, whichever is prepared first.
            let held: Vec<Work> = claims.into_iter().map(|claim| self.held.hold(claim)).collect();
            try_join_all(held.into_iter().map(|work| self.make_ready(work, &ready, &ended))).await?;
        }
    }

    /// Prepares a job and passes it on: to the engine, or with what is wrong with it to the recorder.
    async fn make_ready(
        &self,
        mut work: Work,
        ready: &mpsc::Sender<Ready>,
        ended: &mpsc::Sender<Ended>,
    ) -> Result<(), PipelineError> {
        self.parts.events.event(Event::Claimed { job: &work.claim.job, lease: work.held.lease });
        let passed = match self.prepare(&mut work).await {
            Ok(request) => ready.send(Ready::new(work, request)).await.is_ok(),
            Err(error) => ended.send(Ended { work, result: Err(error) }).await.is_ok(),
        };
        if passed { Ok(()) } else { Err(PipelineError::EngineGone) }
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
