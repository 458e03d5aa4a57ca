//! What a pipeline tells of itself while it works, for progress bars, logs and metrics.
//!
//! Invariant: no document text is in an event but the result's own, in [`Event::Ended`].

use crate::engine::Progress;
use crate::job::{Job, JobId, Stage};
use crate::store::{AttemptReport, Lease, Swept};

/// Something has happened.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// A job was claimed.
    Claimed { job: &'a Job, lease: Lease },
    /// A job has entered a stage.
    Entered { job: JobId, stage: Stage },
    /// A job's prompt is made; so many tokens go into the engine.
    Prompted { job: JobId, tokens: usize },
    /// The engine is further.
    Progressed { job: JobId, progress: Progress },
    /// An attempt was recorded.
    Ended { job: &'a Job, lease: Lease, report: &'a AttemptReport },
    /// An attempt was dropped, because another worker has the job by now.
    Lost { job: &'a Job, lease: Lease },
    /// Jobs that nobody held any more were taken care of.
    Swept { swept: Swept },
    /// The store does not answer; it is asked again.
    StoreUnavailable { operation: &'static str, reason: &'a str },
}

/// Listens. Called from the pipeline's tasks and the engine's threads: must be quick and must not block.
pub trait EventSink: Send + Sync {
    /// Takes an event.
    fn event(&self, event: Event<'_>);
}
