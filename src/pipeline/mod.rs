//! A job's way through this process: claim, fetch, decode, tokenize, infer, record. The same for `apbd run` and `apbd serve`,
//! which differ in what is plugged in.
//!
//! Three hands pass a [`Work`](work::Work) on, and a channel between two of them bounds what waits: [`claim`] takes a job, reads its
//! documents and makes the prompt; [`infer`] are the threads that call the engine; [`record`] writes what came of it.
//! [`heartbeat`] keeps the leases of everything that is in one of these hands.
//!
//! Invariant: every job that was claimed is recorded or handed back before [`Pipeline::run`] returns, unless its lease was
//! lost or the process was told to stop at once.

mod claim;
pub mod events;
mod heartbeat;
mod infer;
mod output;
mod overflow;
mod prepare;
mod record;
pub mod shutdown;
#[cfg(test)]
mod tests;
mod work;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::document::fetch::DocumentSource;
use crate::engine::Engine;
use crate::job::retry::RetryPolicy;
use crate::job::{JobId, WorkerId};
use crate::prompt::Prompter;
use crate::store::{Store, StoreError};

use events::EventSink;
use shutdown::Shutdown;
use work::{Holder, Interrupt};

/// Requests at a time, whatever an engine says of itself: each has a thread.
const AT_ONCE: usize = 1024;

/// What is plugged in.
#[derive(Clone)]
pub struct Parts {
    /// Where jobs come from and results go.
    pub store: Arc<dyn Store>,
    /// Where documents come from.
    pub documents: Arc<dyn DocumentSource>,
    /// Documents and instruction to tokens of the engine's model.
    pub prompter: Arc<Prompter>,
    /// The model.
    pub engine: Arc<dyn Engine>,
    /// Who wants to know how it goes.
    pub events: Arc<dyn EventSink>,
}

/// How it works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this worker; no other process has it.
    pub worker: WorkerId,
    /// How long a job stays this worker's without a heartbeat; three fit into it.
    pub lease: Duration,
    /// Jobs prepared ahead, beyond those in the engine; at least 1.
    pub ahead: usize,
    /// How long to wait before the store is asked again when it had no job.
    pub poll: Duration,
    /// Only these jobs, and the end when all of them have ended; absent: any job, for ever.
    pub only: Option<Vec<JobId>>,
    /// Models that jobs may name; empty: any name.
    pub models: Vec<String>,
    /// Jobs known to be larger are left to others.
    pub claim_at_most_bytes: Option<u64>,
    /// Bytes that the documents of a job may have together.
    pub documents_at_most_bytes: u64,
    /// What errors mean.
    pub retry: RetryPolicy,
    /// How long a job in the engine may go on after the first signal to stop.
    pub grace: Duration,
}

/// Why a pipeline gave up. What it held is claimed again when its lease has run out.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The store refused what it must not refuse.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A thread for the engine could not be started.
    #[error("could not start a thread for the engine: {0}")]
    Thread(#[from] io::Error),
    /// The threads of the engine ended under the pipeline.
    #[error("the engine's threads ended")]
    EngineGone,
}

/// One engine at work.
pub struct Pipeline {
    parts: Parts,
    settings: Settings,
    held: Holder,
    /// A stop was asked for, and its grace has passed.
    grace_over: CancellationToken,
}

impl Pipeline {
    /// A pipeline that does nothing before [`run`](Self::run).
    pub fn new(parts: Parts, settings: Settings) -> Self {
        Self { parts, settings, held: Holder::default(), grace_over: CancellationToken::new() }
    }

    /// Works until all jobs of `settings.only` have ended, or `shutdown` says to drain.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), PipelineError> {
        let pipeline = Arc::new(self);
        let (ahead, at_once) = (pipeline.settings.ahead.max(1), pipeline.at_once());
        let (ready, requests) = mpsc::channel(ahead);
        let (ended, results) = mpsc::channel(ahead + at_once);
        let engine = infer::spawn(at_once, pipeline.parts.clone(), requests, ended.clone(), shutdown.clone())?;
        let over = CancellationToken::new();
        let heart = tokio::spawn(pipeline.clone().beat(over.clone()));
        let drain = tokio::spawn(pipeline.clone().interrupt_after_grace(shutdown.clone(), over.clone()));

        // Claims end first; that closes the engine's channel, and the engine's end closes the recorder's.
        let (claimed, recorded) = tokio::join!(
            pipeline.claim_and_prepare(ready, ended, shutdown.clone()),
            pipeline.record_all(results, shutdown)
        );
        over.cancel();
        // Both tasks end at `over`; a panic in one of them has been printed by its own thread.
        let _ = tokio::join!(heart, drain);
        let join = move || engine.into_iter().map(thread::JoinHandle::join).filter(Result::is_err).count();
        let engine_ended = tokio::task::spawn_blocking(join).await;
        // Where the recorder gave up, the claims end for want of a taker: its reason is the reason.
        recorded.and(claimed)?;
        match engine_ended {
            Ok(0) => Ok(()),
            _ => Err(PipelineError::EngineGone),
        }
    }

    /// Requests that the engine takes at a time.
    fn at_once(&self) -> usize {
        self.parts.engine.info().concurrency.clamp(1, AT_ONCE)
    }

    /// After the first signal, gives what is in the engine its grace and then calls it off.
    async fn interrupt_after_grace(self: Arc<Self>, shutdown: Shutdown, over: CancellationToken) {
        let grace = async {
            shutdown.draining().await;
            tokio::time::sleep(self.settings.grace).await;
        };
        tokio::select! {
            () = over.cancelled() => {}
            () = grace => {
                self.held.interrupt_all(Interrupt::Shutdown);
                self.grace_over.cancel();
            }
        }
    }
}
