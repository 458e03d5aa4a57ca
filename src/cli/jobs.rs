//! `apbd jobs`: what is in the database, the newest first.

use crate::job::JobId;
use crate::store::{JobFilter, JobState, JobSummary};

use super::database::{DatabaseArgs, Format, print_json, print_table};
use super::{CliError, Status, runtime};

/// Arguments of `apbd jobs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Only jobs in this state; may be given several times.
    #[arg(long = "state", value_name = "STATE")]
    states: Vec<JobState>,
    /// Only these jobs.
    #[arg(long = "job", value_name = "ID")]
    jobs: Vec<JobId>,
    /// Rows at most.
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: u32,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Prints the jobs.
    pub fn execute(self) -> Result<Status, CliError> {
        let only = (!self.jobs.is_empty()).then_some(self.jobs);
        let filter = JobFilter { states: self.states, only, limit: self.limit };
        let jobs = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let jobs = store.list(&filter).await?;
            store.close().await;
            Ok::<_, CliError>(jobs)
        })?;
        match self.format {
            Format::Json => print_json(&jobs)?,
            Format::Table => print_table(
                &["job", "state", "task", "document", "attempts", "tokens in", "out", "enqueued", "what"],
                jobs.iter().map(row).collect(),
            )?,
        }
        Ok(Status::Done)
    }
}

fn row(job: &JobSummary) -> Vec<String> {
    let count = |tokens: Option<crate::job::TokenCount>| tokens.map(|tokens| tokens.to_string()).unwrap_or_default();
    let progress = job.progress.map(|at| match at.total {
        0 => at.stage.as_str().to_owned(),
        total => format!("{} {}/{total}", at.stage.as_str(), at.done),
    });
    let error = job.error.as_ref().map(|error| format!("{}: {error}", error.code));
    vec![
        job.job_id.to_string(),
        job.state.to_string(),
        job.task.to_string(),
        job.document.clone(),
        job.attempt.to_string(),
        count(job.tokens_in),
        count(job.tokens_out),
        job.enqueued_at.format("%Y-%m-%d %H:%M:%S").to_string(),
        progress.or(error).unwrap_or_default(),
    ]
}
