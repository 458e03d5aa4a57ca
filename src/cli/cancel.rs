//! `apbd cancel`: a waiting job ends at once, a running one within a decode step or a layer.

use crate::job::JobId;
use crate::store::CancelOutcome;

use super::database::DatabaseArgs;
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd cancel`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The jobs.
    #[arg(value_name = "ID", required = true)]
    jobs: Vec<JobId>,
}

impl Args {
    /// Cancels the jobs; a line each says what came of it.
    pub fn execute(self) -> Result<Status, CliError> {
        runtime()?.block_on(async {
            let store = self.database.open().await?;
            let mut status = Status::Done;
            for job in self.jobs {
                let outcome = store.cancel(job).await?;
                let said = match outcome {
                    CancelOutcome::Cancelled => "cancelled".to_owned(),
                    CancelOutcome::Requested => "is running; its worker was asked to stop".to_owned(),
                    CancelOutcome::AlreadyFinal(state) => format!("had ended: {state}"),
                    CancelOutcome::NotFound => "there is no such job".to_owned(),
                };
                if outcome == CancelOutcome::NotFound {
                    status = Status::SomeFailed;
                }
                print(&format!("{job}: {said}\n"))?;
            }
            store.close().await;
            Ok(status)
        })
    }
}
