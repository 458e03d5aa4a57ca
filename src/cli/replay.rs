//! `apbd replay`: ended jobs once more, with clean counters.

use crate::job::JobId;
use crate::store::Replay;

use super::database::{DatabaseArgs, Format, print_json};
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Jobs that are dead, failed or cancelled.
    #[arg(value_name = "ID", required_unless_present_any = ["dead", "failed"])]
    jobs: Vec<JobId>,
    /// All dead jobs.
    #[arg(long, conflicts_with_all = ["jobs", "failed"])]
    dead: bool,
    /// All failed jobs.
    #[arg(long, conflicts_with = "jobs")]
    failed: bool,
    /// How to say what came of it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Queues the jobs again and prints how many.
    pub fn execute(self) -> Result<Status, CliError> {
        let what = match (self.dead, self.failed) {
            (true, _) => Replay::Dead,
            (_, true) => Replay::Failed,
            _ => Replay::Jobs(self.jobs),
        };
        let replayed = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let replayed = store.replay(&what).await?;
            store.close().await;
            Ok::<_, CliError>(replayed)
        })?;
        match self.format {
            Format::Json => print_json(&serde_json::json!({ "queued_again": replayed }))?,
            Format::Table => print(&format!("{replayed} queued again\n"))?,
        }
        let short = matches!(&what, Replay::Jobs(jobs) if (jobs.len() as u64) > replayed);
        Ok(if short { Status::SomeFailed } else { Status::Done })
    }
}
