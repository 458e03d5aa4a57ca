//! What the pipeline tells, as one log line and one metric each.
//!
//! Invariant: ids, codes and numbers only; no word of a document or of an answer.

use tracing::{debug, info, warn};

use crate::job::{Disposition, ErrorCode, Stage};
use crate::pipeline::events::{Event, EventSink};
use crate::store::{AttemptReport, Ending, JobState, Swept};
use crate::telemetry::metrics;

/// Why an engine's process ends.
const ENGINE_ENDS: [&str; 5] = ["crashed", "hung", "device", "died_idle", "not_started"];

/// To the log and the metrics.
pub(super) struct Telemetry(());

impl Telemetry {
    /// Shows what alerts are about as 0 from the start: of a series that first appears as 1 Prometheus sees no increase.
    pub fn start(groups: &[&str]) -> Self {
        for code in ErrorCode::ALL {
            for state in [JobState::Failed, JobState::Dead] {
                metrics::ATTEMPTS.add(&[state.as_str(), code.as_str()], 0);
            }
            if code.disposition() == Disposition::Fail {
                for door in ["amqp", "drop"] {
                    metrics::REJECTED.add(&[door, code.as_str()], 0);
                }
            }
        }
        for group in groups {
            ENGINE_ENDS.iter().for_each(|reason| metrics::ENGINE_ENDS.add(&[group, reason], 0));
        }
        ["sent", "returned", "given_up"].iter().for_each(|outcome| metrics::EVENTS.add(&[outcome], 0));
        sweep(Swept::default());
        Self(())
    }
}

impl EventSink for Telemetry {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Claimed { job, lease } => {
                metrics::CLAIMED.add(&[], 1);
                info!(job.id = %job.id, job.attempt = %lease.attempt, job.task = job.task.as_str(), "claimed");
            }
            Event::Ended { job, lease, report } => {
                count(report);
                let state = report.ending.state();
                match &report.ending {
                    Ending::Succeeded(_) => {
                        info!(job.id = %job.id, job.attempt = %lease.attempt, job.total_ms = report.stages.total().as_millis() as u64, "succeeded");
                    }
                    Ending::Errored { error, .. } => {
                        warn!(job.id = %job.id, job.attempt = %lease.attempt, job.state = %state, error.code = %error.code, error.message = error.message, "not succeeded");
                    }
                }
            }
            Event::Lost { job, lease } => {
                metrics::LEASES_LOST.add(&[], 1);
                warn!(job.id = %job.id, job.attempt = %lease.attempt, "another worker has the job by now");
            }
            Event::Swept { swept } => {
                sweep(swept);
                if swept != Swept::default() {
                    warn!(swept.requeued, swept.quarantined, swept.expired, swept.cancelled, "jobs that nobody held");
                }
            }
            Event::StoreUnavailable { operation, reason } => {
                metrics::STORE_FAILURES.add(&[operation], 1);
                warn!(store.operation = operation, error.message = reason, "the store does not answer");
            }
            Event::Entered { job, stage } => debug!(job.id = %job, job.stage = stage.as_str(), "entered"),
            Event::Prompted { .. } | Event::Progressed { .. } => {}
        }
    }
}

fn sweep(swept: Swept) {
    let Swept { requeued, quarantined, expired, cancelled } = swept;
    let outcomes =
        [("requeued", requeued), ("quarantined", quarantined), ("expired", expired), ("cancelled", cancelled)];
    outcomes.iter().for_each(|(outcome, jobs)| metrics::SWEPT.add(&[outcome], *jobs));
}

fn count(report: &AttemptReport) {
    let state = report.ending.state();
    let code = match &report.ending {
        Ending::Succeeded(result) => {
            metrics::TOKENS.add(&["in"], result.tokens_in.0);
            metrics::TOKENS.add(&["out"], result.tokens_out.0);
            "none"
        }
        Ending::Errored { error, .. } => error.code.as_str(),
    };
    metrics::ATTEMPTS.add(&[state.as_str(), code], 1);
    for stage in Stage::ALL {
        if let Some(time) = report.stages.get(stage) {
            metrics::STAGE_SECONDS.observe(stage.as_str(), time);
        }
    }
}
