//! `apbd cancel`: a waiting job ends at once, a running one within a decode step or a layer.

use serde_json::{Value, json};

use crate::job::JobId;
use crate::store::CancelOutcome;

use super::database::{DatabaseArgs, Format, print_json};
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd cancel`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The jobs.
    #[arg(value_name = "ID", required = true)]
    jobs: Vec<JobId>,
    /// How to say what came of it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Cancels the jobs; a line each says what came of it.
    pub fn execute(self) -> Result<Status, CliError> {
        let outcomes = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let mut outcomes = Vec::with_capacity(self.jobs.len());
            for job in self.jobs {
                outcomes.push((job, store.cancel(job).await?));
            }
            store.close().await;
            Ok::<_, CliError>(outcomes)
        })?;
        match self.format {
            Format::Json => print_json(&outcomes.iter().map(as_json).collect::<Vec<_>>())?,
            Format::Table => print(&outcomes.iter().map(as_line).collect::<String>())?,
        }
        let missing = outcomes.iter().any(|(_, outcome)| *outcome == CancelOutcome::NotFound);
        Ok(if missing { Status::SomeFailed } else { Status::Done })
    }
}

fn as_line((job, outcome): &(JobId, CancelOutcome)) -> String {
    let said = match outcome {
        CancelOutcome::Cancelled => "cancelled".to_owned(),
        CancelOutcome::Requested => "is running; its worker was asked to stop".to_owned(),
        CancelOutcome::AlreadyFinal(state) => format!("had ended: {state}"),
        CancelOutcome::NotFound => "there is no such job".to_owned(),
    };
    format!("{job}: {said}\n")
}

fn as_json((job, outcome): &(JobId, CancelOutcome)) -> Value {
    let (outcome, state) = match outcome {
        CancelOutcome::Cancelled => ("cancelled", None),
        CancelOutcome::Requested => ("requested", None),
        CancelOutcome::AlreadyFinal(state) => ("had_ended", Some(state)),
        CancelOutcome::NotFound => ("not_found", None),
    };
    json!({ "job_id": job, "outcome": outcome, "state": state })
}
