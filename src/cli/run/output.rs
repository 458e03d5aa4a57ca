//! What came of the documents: a table for people, JSON lines for programs.
//!
//! Invariant: a record has the same keys whatever came of its document.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::cli::CliError;
use crate::cli::database::print_table;
use crate::job::{DocumentUri, JobId, ResultFlags, Stage, Task};
use crate::store::{JobDetail, JobState};

use super::Format;

/// Characters of an output that the table shows at most; the whole is in the database and in the JSON.
const SHOWN_CHARS: usize = 400;

/// One document and what came of it.
#[derive(Debug, Serialize)]
pub(super) struct Record {
    document: String,
    job_id: JobId,
    pub state: JobState,
    /// It was done in an earlier run.
    done_before: bool,
    task: Task,
    /// The output.
    text: Option<String>,
    /// The output as JSON, for `extract`.
    extraction: Option<Value>,
    tokens_in: Option<u64>,
    tokens_out: Option<u64>,
    /// Milliseconds of each stage of the last attempt; absent where it was not reached.
    stages_ms: BTreeMap<&'static str, f64>,
    attention: Option<AttentionRecord>,
    flags: Option<ResultFlags>,
    model: Option<String>,
    model_digest: Option<String>,
    error: Option<ErrorRecord>,
}

#[derive(Debug, Serialize)]
struct AttentionRecord {
    mode: String,
    hosts: usize,
    anchor: usize,
    passing: usize,
    exact: bool,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ErrorRecord {
    code: String,
    class: &'static str,
    message: String,
}

impl Record {
    /// From everything the store has of a job.
    pub fn new(detail: &JobDetail, done_before: bool) -> Self {
        let (summary, result) = (&detail.summary, detail.result.as_ref());
        let stages = detail.attempts.last().map(|attempt| attempt.stages).unwrap_or_default();
        let milliseconds = |stage: Stage| stages.get(stage).map(|time| (stage.as_str(), time.as_secs_f64() * 1000.0));
        let attention = result.map(|result| AttentionRecord {
            mode: format!("{:?}", result.plan.mode).to_lowercase(),
            hosts: result.plan.hosts.len(),
            anchor: result.plan.anchor.as_ref().map_or(0, |anchor| anchor.len),
            passing: result.plan.hosts.first().map_or(0, |host| host.compressed),
            exact: result.plan.exact,
            notes: result.plan.notes.clone(),
        });
        let error = summary.error.as_ref().filter(|_| summary.state != JobState::Succeeded);
        Self {
            document: named(&summary.document),
            job_id: summary.job_id,
            state: summary.state,
            done_before,
            task: summary.task,
            text: result.map(|result| result.text.clone()),
            extraction: result.and_then(|result| result.extraction.clone()),
            tokens_in: summary.tokens_in.map(|tokens| tokens.0),
            tokens_out: summary.tokens_out.map(|tokens| tokens.0),
            stages_ms: Stage::ALL.into_iter().filter_map(milliseconds).collect(),
            attention,
            flags: result.map(|result| result.flags),
            model: result.map(|result| result.model.clone()),
            model_digest: result.map(|result| result.model_digest.clone()),
            error: error.map(|error| ErrorRecord {
                code: error.code.to_string(),
                class: error.class().as_str(),
                message: error.message.clone(),
            }),
        }
    }

    fn row(&self) -> Vec<String> {
        let name = Path::new(&self.document).file_name().map(|name| name.to_string_lossy().into_owned());
        let seconds =
            self.stages_ms.iter().filter(|(stage, _)| **stage != Stage::Queue.as_str()).map(|(_, ms)| ms).sum::<f64>()
                / 1000.0;
        let attention = self.attention.as_ref().map(|attention| match attention.hosts {
            1 => format!("{}, exact", attention.mode),
            hosts => format!("{} × {hosts}, {}", attention.mode, if attention.exact { "exact" } else { "approx." }),
        });
        vec![
            name.unwrap_or_else(|| self.document.clone()),
            self.tokens_in.map(|tokens| tokens.to_string()).unwrap_or_default(),
            attention.unwrap_or_default(),
            if self.state == JobState::Succeeded { format!("{seconds:.1}") } else { String::new() },
            self.outcome(),
        ]
    }

    /// The answer, or why there is none; with what a reader has to know of it.
    fn outcome(&self) -> String {
        if let Some(error) = &self.error {
            return format!("{}: {}", self.state, error.message);
        }
        let Some(text) = &self.text else { return self.state.to_string() };
        let mut shown = shorten(text);
        for note in self.remarks() {
            shown.push_str(&format!("\n[{note}]"));
        }
        shown
    }

    fn remarks(&self) -> Vec<&'static str> {
        let flags = self.flags.unwrap_or_default();
        let remarks = [
            (self.done_before, "done in an earlier run"),
            (flags.output_truncated, "cut short: --max-new-tokens reached"),
            (flags.input_truncated, "the middle of the document was left out"),
            (flags.schema_failed, "does not follow the schema"),
        ];
        remarks.into_iter().filter(|(holds, _)| *holds).map(|(_, remark)| remark).collect()
    }
}

/// A document as a person would write it: of a file its path.
fn named(uri: &str) -> String {
    match uri.parse() {
        Ok(DocumentUri::File { path }) => path.display().to_string(),
        _ => uri.to_owned(),
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Prints the records, and writes them to `out` if that is given.
pub(super) fn print(records: &[Record], format: Format, out: Option<&Path>) -> Result<(), CliError> {
    let lines = || -> Result<String, CliError> {
        let line = |record: &Record| serde_json::to_string(record).map(|line| line + "\n");
        records.iter().map(line).collect::<Result<_, _>>().map_err(|error| CliError::Internal(error.to_string()))
    };
    if let Some(path) = out {
        let written = fs::write(path, lines()?);
        written.map_err(|error| CliError::Usage(format!("--out {}: {error}", path.display())))?;
    }
    match format {
        Format::Jsonl => crate::cli::print(&lines()?),
        Format::Table => {
            let columns = ["document", "tokens", "attention", "seconds", "result"];
            print_table(&columns, records.iter().map(Record::row).collect())
        }
    }
}
