//! `apbd forget`: what ended long ago leaves the database.

use std::time::Duration;

use crate::store::Forgotten;

use super::database::{DatabaseArgs, Format, print_json};
use super::{CliError, Status, print, runtime};

/// Jobs of a transaction: few enough that nobody waits for it.
const BATCH: u32 = 1000;
const DAY: u64 = 24 * 3600;

/// Arguments of `apbd forget`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Jobs that succeeded, failed or were cancelled so many days ago or longer, and messages that were rejected then; 0: all of them.
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u64).range(..=36_500))]
    older_than: u64,
    /// How to say what came of it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Deletes them, batch by batch, and prints how many there were.
    pub fn execute(self) -> Result<Status, CliError> {
        let age = Duration::from_secs(self.older_than * DAY);
        let forgotten = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let mut forgotten = Forgotten::default();
            loop {
                let batch = store.forget(age, BATCH).await?;
                forgotten.jobs += batch.jobs;
                forgotten.rejections += batch.rejections;
                if batch == Forgotten::default() {
                    break;
                }
            }
            store.close().await;
            Ok::<_, CliError>(forgotten)
        })?;
        match self.format {
            Format::Json => print_json(&forgotten)?,
            Format::Table => {
                print(&format!("{} jobs and {} rejected messages forgotten\n", forgotten.jobs, forgotten.rejections))?;
            }
        }
        Ok(Status::Done)
    }
}
