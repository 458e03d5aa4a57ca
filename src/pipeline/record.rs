//! The third hand: writes what came of an attempt, until the store has it.
//!
//! Invariant: a result is given up only if its lease is lost, or the process has to stop (at once, or its grace is over) while the store
//! does not answer.

use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

use super::claim::Wait;
use super::events::Event;
use super::infer::Ended;
use super::output;
use super::shutdown::Shutdown;
use super::work::{Interrupt, Work};
use super::{Pipeline, PipelineError};
use crate::engine::InferOutcome;
use crate::failpoint;
use crate::job::{JobError, Stage};
use crate::store::{AttemptReport, Ending};

/// Attempts written at the same time, so that short jobs share the flushes of the database's log; never more than there can be.
const RECORDED_AT_ONCE: usize = 8;

impl Pipeline {
    /// Records until nothing can come any more.
    pub(super) async fn record_all(
        &self,
        mut results: mpsc::Receiver<Ended>,
        shutdown: Shutdown,
    ) -> Result<(), PipelineError> {
        let at_once = (self.settings.ahead.max(self.at_once())).clamp(1, RECORDED_AT_ONCE);
        let (mut writing, mut failed, mut more) = (FuturesUnordered::new(), None, true);
        loop {
            tokio::select! {
                ended = results.recv(), if more && writing.len() < at_once => match ended {
                    Some(Ended { work, result }) => writing.push(self.record(work, result, &shutdown)),
                    None => more = false,
                },
                Some(written) = writing.next(), if !writing.is_empty() => {
                    if let Err(error) = written {
                        // The others' transactions still come to their end.
                        (failed, more) = (Some(error), false);
                    }
                }
                else => return failed.map_or(Ok(()), Err),
            }
        }
    }

    async fn record(
        &self,
        mut work: Work,
        result: Result<InferOutcome, JobError>,
        shutdown: &Shutdown,
    ) -> Result<(), PipelineError> {
        let began = Instant::now();
        let ending = match result {
            Ok(outcome) => {
                let result = output::result(&work.claim.job, work.flags, outcome, self.parts.engine.info());
                Ending::Succeeded(Box::new(result))
            }
            Err(error) => {
                let claim = &work.claim;
                let verdict = self.settings.retry.verdict(claim.job.id, claim.attempt, claim.failures, &error);
                Ending::Errored { error, verdict }
            }
        };
        work.spent(Stage::Record, began.elapsed());
        work.enter(Stage::Record);
        let documents = std::mem::take(&mut work.documents);
        let report = AttemptReport { ending, stages: work.stages, documents };
        let (job, lease) = (&work.claim.job, work.held.lease);
        failpoint::reach("record.begun");
        let written = self.finish(&work, &report, shutdown).await?;
        failpoint::reach("record.committed");
        match written {
            true => self.parts.events.event(Event::Ended { job, lease, report: &report }),
            false => self.parts.events.event(Event::Lost { job, lease }),
        }
        Ok(())
    }

    /// Writes the report; `false` if it is not this worker's to write any more.
    async fn finish(&self, work: &Work, report: &AttemptReport, shutdown: &Shutdown) -> Result<bool, PipelineError> {
        let mut wait = Wait::default();
        while work.held.interrupted() != Some(Interrupt::LeaseLost) {
            let pause = match self.parts.store.finish(&work.held.lease, report).await {
                Ok(written) => return Ok(written),
                Err(error) => wait.after("finish", error, self)?,
            };
            tokio::select! {
                () = shutdown.stopping() => break,
                () = self.grace_over.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        Ok(false)
    }
}
