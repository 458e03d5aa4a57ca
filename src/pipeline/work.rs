//! A job in this worker's hands, and why it may have to be dropped.
//!
//! Invariant: a job is in the [`Holder`] from its claim until its [`Work`] is dropped, so that every held job gets a heartbeat.

use std::future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::Notify;

use crate::job::{DocumentFacts, ErrorCode, JobError, ResultFlags, Stage, StageTimes};
use crate::store::{Claim, JobProgress, Lease};

/// Why a job is not to be finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// Somebody cancelled it.
    Cancelled,
    /// Its deadline has passed.
    DeadlineExceeded,
    /// It is another worker's now.
    LeaseLost,
    /// This worker stops.
    Shutdown,
}

impl Interrupt {
    /// As the reason why an attempt gave no result.
    pub fn error(self) -> JobError {
        match self {
            Self::Cancelled => JobError::new(ErrorCode::Cancelled, "cancelled while it was worked on"),
            Self::DeadlineExceeded => {
                JobError::new(ErrorCode::DeadlineExceeded, "the deadline passed before it was done")
            }
            Self::LeaseLost => JobError::new(ErrorCode::LeaseLost, "another worker has taken it over"),
            Self::Shutdown => JobError::new(ErrorCode::Shutdown, "the worker was told to stop"),
        }
    }
}

/// What the heartbeat and the engine's thread share of a job.
pub(super) struct Held {
    pub lease: Lease,
    deadline: Option<DateTime<Utc>>,
    state: Mutex<(Option<Interrupt>, Option<JobProgress>)>,
    /// Wakes who waits in [`called_off`](Self::called_off); a permit stays if nobody does yet.
    told: Notify,
}

impl Held {
    /// Calls the job off; the first reason stays, but that a lease is lost always counts.
    pub fn interrupt(&self, why: Interrupt) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.is_none() || why == Interrupt::LeaseLost {
            state.0 = Some(why);
            self.told.notify_one();
        }
    }

    /// Returns when the job is called off, or its deadline has passed. One waiter at a time.
    pub async fn called_off(&self) -> Interrupt {
        loop {
            if let Some(why) = self.interrupted() {
                return why;
            }
            tokio::select! {
                () = self.told.notified() => {}
                () = self.due() => {}
            }
        }
    }

    /// Returns at the deadline; never if there is none.
    async fn due(&self) {
        let Some(deadline) = self.deadline else { return future::pending().await };
        tokio::time::sleep((deadline - Utc::now()).to_std().unwrap_or_default()).await;
    }

    /// Why the job is to be dropped, if it is.
    pub fn interrupted(&self) -> Option<Interrupt> {
        if self.deadline.is_some_and(|deadline| deadline <= Utc::now()) {
            self.interrupt(Interrupt::DeadlineExceeded);
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    pub fn progressed(&self, progress: JobProgress) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(progress);
    }

    pub fn progress(&self) -> Option<JobProgress> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

/// All jobs this worker holds.
#[derive(Clone, Default)]
pub(super) struct Holder(Arc<Mutex<Vec<Arc<Held>>>>);

impl Holder {
    /// Holds a claimed job.
    pub fn hold(&self, claim: Claim) -> Work {
        let state = Mutex::new((None, None));
        let held = Arc::new(Held { lease: claim.lease(), deadline: claim.job.deadline, state, told: Notify::new() });
        self.lock().push(held.clone());
        let mut stages = StageTimes::default();
        stages.add(Stage::Queue, claim.queued_for);
        let flags = ResultFlags { text_cleaned: claim.job.text_cleaned, ..ResultFlags::default() };
        Work { claim, held, stages, documents: Vec::new(), flags, holder: self.clone() }
    }

    /// The jobs held now.
    pub fn all(&self) -> Vec<Arc<Held>> {
        self.lock().clone()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub fn interrupt_all(&self, why: Interrupt) {
        self.lock().iter().for_each(|held| held.interrupt(why));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Held>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt at a job, with what is known of it so far.
pub(super) struct Work {
    pub claim: Claim,
    pub held: Arc<Held>,
    pub stages: StageTimes,
    pub documents: Vec<DocumentFacts>,
    pub flags: ResultFlags,
    holder: Holder,
}

impl Work {
    /// The reason to drop the job, if there is one, as an error.
    pub fn check(&self) -> Result<(), JobError> {
        self.held.interrupted().map_or(Ok(()), |why| Err(why.error()))
    }

    /// Marks that the job is in `stage`, for those who look at the store meanwhile.
    pub fn enter(&self, stage: Stage) {
        self.held.progressed(JobProgress { stage, done: 0, total: 0 });
    }

    pub fn spent(&mut self, stage: Stage, time: Duration) {
        self.stages.add(stage, time);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.holder.lock().retain(|held| !Arc::ptr_eq(held, &self.held));
    }
}
