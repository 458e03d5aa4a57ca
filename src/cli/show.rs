//! `apbd show`: everything about one job.

use std::fmt::Write;

use crate::job::{JobId, Stage};
use crate::store::{AttemptRecord, JobDetail};

use super::database::{DatabaseArgs, Format, print_json};
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd show`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The job.
    #[arg(value_name = "ID")]
    job: JobId,
    /// How to print it.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Prints the job.
    pub fn execute(self) -> Result<Status, CliError> {
        let detail = runtime()?.block_on(async {
            let store = self.database.open().await?;
            let detail = store.show(self.job).await?;
            store.close().await;
            Ok::<_, CliError>(detail)
        })?;
        let place = self.database.url()?;
        let Some(detail) = detail else {
            return Err(CliError::Usage(format!("{place}: there is no job {}", self.job)));
        };
        match self.format {
            Format::Json => print_json(&detail)?,
            Format::Table => print(&text(&detail))?,
        }
        Ok(Status::Done)
    }
}

fn text(detail: &JobDetail) -> String {
    let mut out = String::new();
    let summary = &detail.summary;
    let mut line = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name:<12} {value}");
    };
    line("job", summary.job_id.to_string());
    line("state", format!("{}{}", summary.state, if detail.cancel_requested { ", asked to stop" } else { "" }));
    line("task", summary.task.to_string());
    line("priority", summary.priority.get().to_string());
    line("from", format!("{:?}: {}", detail.door, detail.origin));
    for document in &detail.documents {
        let facts = &document.facts;
        let known =
            [facts.media_type.clone(), facts.encoding.clone(), facts.tokens.map(|tokens| format!("{tokens} tokens"))];
        let known: Vec<String> = known.into_iter().flatten().collect();
        line("document", format!("{}  {}", document.uri, known.join(", ")).trim_end().to_owned());
    }
    for attempt in &detail.attempts {
        line("attempt", format!("{}  {}", attempt.attempt, attempt_text(attempt)));
    }
    if let Some(error) = &summary.error {
        line("error", format!("{} ({}): {error}", error.code, error.class().as_str()));
    }
    if let Some(result) = &detail.result {
        line("model", format!("{} on {}", result.model, result.device));
        line(
            "attention",
            format!(
                "{:?}, {} hosts, {}",
                result.plan.mode,
                result.plan.hosts.len(),
                if result.plan.exact { "exact" } else { "approximate" }
            ),
        );
        line("tokens", format!("{} in, {} out", result.tokens_in, result.tokens_out));
        for note in &result.plan.notes {
            line("note", note.clone());
        }
        line("result", format!("\n{}", result.text));
    }
    out
}

fn attempt_text(attempt: &AttemptRecord) -> String {
    let times = Stage::ALL.into_iter().filter_map(|stage| {
        let time = attempt.stages.get(stage)?;
        Some(format!("{} {:.2} s", stage.as_str(), time.as_secs_f64()))
    });
    let times: Vec<String> = times.collect();
    format!("{} on {}, {}", attempt.outcome, attempt.worker, times.join(", "))
}
