//! The end of an attempt: everything it leaves behind, in one transaction that a stale worker can not make.
//!
//! Invariant: the job's state, its result, its timing, the sums of the reports and its completion event are written together
//! or not at all. What is written is said here; each database writes it in its own words.

use crate::failpoint;
use crate::job::retry::Verdict;
use crate::job::{JobError, JobResult};

use super::{AttemptReport, Ending, JobState, Lease, StoreError};

/// A database that attempts end in.
pub(super) trait Finish {
    /// A transaction that was begun.
    type Transaction;

    /// The state of a job whose attempt this was until now; nothing if the attempt is not the job's any more, or does not run.
    async fn end_job(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<Option<JobState>, StoreError>;
    /// Ends a job that waits.
    async fn end_waiting_job(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<(), StoreError>;
    async fn write_attempt(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
        outcome: &str,
    ) -> Result<(), StoreError>;
    async fn write_documents(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
    ) -> Result<(), StoreError>;
    /// A job that was replayed after a result has a new one.
    async fn write_result(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        result: &JobResult,
    ) -> Result<(), StoreError>;
    /// The completion event, for those who asked for one, and the result file, if one is to be written.
    async fn write_event(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        ending: &Ending,
    ) -> Result<(), StoreError>;

    /// Ends an attempt as its worker says. `false`: it is not the job's any more, and nothing was written.
    async fn finish_attempt(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
    ) -> Result<bool, StoreError> {
        let report = report.storable();
        let ended = self.end_attempt(transaction, lease, &report, report.ending.outcome()).await?;
        if ended {
            failpoint::reach("record.uncommitted");
        }
        Ok(ended)
    }

    /// The same, with an outcome that is not the worker's to say.
    async fn end_attempt(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        report: &AttemptReport,
        outcome: &str,
    ) -> Result<bool, StoreError> {
        let ended = self.end_job(transaction, lease, &report.ending).await?;
        let Some(state) = ended else { return Ok(false) };
        self.write_attempt(transaction, lease, report, outcome).await?;
        self.write_documents(transaction, lease, report).await?;
        if let Ending::Succeeded(result) = &report.ending {
            self.write_result(transaction, lease, result).await?;
        }
        // A job that was to be tried again, but that somebody wants stopped, has ended all the same.
        match (&report.ending, state) {
            (Ending::Errored { error, .. }, JobState::Cancelled) => {
                let ending = Ending::Errored { error: error.clone(), verdict: Verdict::Cancelled };
                self.write_event(transaction, lease, &ending).await?;
            }
            (ending, _) => self.write_event(transaction, lease, ending).await?,
        }
        Ok(true)
    }

    /// Ends a job that no worker holds.
    async fn end_waiting(
        &self,
        transaction: &mut Self::Transaction,
        lease: Lease,
        error: JobError,
        verdict: Verdict,
    ) -> Result<(), StoreError> {
        let ending = Ending::Errored { error, verdict };
        self.end_waiting_job(transaction, lease, &ending).await?;
        self.write_event(transaction, lease, &ending).await
    }
}
