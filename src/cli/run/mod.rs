//! `apbd run`: documents on this machine, with no service. The same pipeline as the daemon's, over a SQLite file and the CPU.
//!
//! Invariant: what was finished is never done again, whatever ended the run before; a document that fails costs only itself.

pub(super) mod model;
pub(super) mod options;
mod output;
mod progress;

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;

use crate::document::fetch::FileSource;
use crate::engine::Engine;
use crate::intake::files::{FileJobs, Found, discover};
use crate::job::retry::RetryPolicy;
use crate::job::{JobId, WorkerId};
use crate::model::chat::ChatFrame;
use crate::model::tokenizer::Tokenizer;
use crate::pipeline::shutdown::{self, Phase, Shutdown};
use crate::pipeline::{Parts, Pipeline, PipelineError, Settings};
use crate::prompt::Prompter;
use crate::store::{self, Access, Enqueued, JobState, NewJob, Replay, Store, StoreUrl};
use crate::telemetry::console;

use super::device::DeviceArgs;
use super::{CliError, Status, runtime};
use options::JobArgs;
use progress::RunProgress;

/// Bytes a document may have: some ten times the longest context of a model that reads books.
const DOCUMENT_AT_MOST_BYTES: u64 = 256 << 20;
/// Nobody else works on the file; a lease only has to outlast a pause of this process.
const LEASE: Duration = Duration::from_secs(60);
/// After the first Ctrl-C, what the engine is at may still end.
const GRACE: Duration = Duration::from_secs(5);

/// Arguments of `apbd run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files, and folders in which documents (text, Markdown, HTML, DOCX, PDF) are looked for.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    job: JobArgs,
    /// Model directory as published on Hugging Face; without it the small model that comes with apbd.
    #[arg(long, value_name = "DIR", env = model::VARIABLE)]
    model: Option<PathBuf>,
    /// Retaining heads (safetensors); without it the model's own, if it has any.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Where jobs and results are kept: a SQLite file, made if it is not there.
    #[arg(long, value_name = "FILE", env = "APBD_DATABASE_URL", hide_env_values = true, default_value = store::url::DEFAULT_SQLITE_FILE)]
    db: StoreUrl,
    /// Also write the results to this file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How to print the results.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Form of the results on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON object a line.
    Jsonl,
}

impl Args {
    /// Processes the documents and prints what came of them.
    pub fn execute(self) -> Result<Status, CliError> {
        let template = self.job.message()?;
        let found = self.discover()?;
        // Both may take a while; neither needs the other, but a usage error should come before the model is loaded.
        let runtime = runtime()?;
        let store = runtime.block_on(store::open(&self.db, Access::Worker, RetryPolicy::local()))?;
        let engine = self.device.one_by_one_on_cpu().open(&self.model_directory()?, self.heads.as_deref())?;
        let prompter = prompter(&self.model_directory()?)?;
        let jobs =
            FileJobs { template, model_digest: engine.info().model_digest, at_most_bytes: DOCUMENT_AT_MOST_BYTES };
        let jobs: Vec<NewJob> = found
            .documents
            .iter()
            .map(|path| jobs.job(path).map_err(|error| CliError::Usage(error.to_string())))
            .collect::<Result<_, _>>()?;
        runtime.block_on(self.process(store, engine, prompter, jobs))
    }

    fn discover(&self) -> Result<Found, CliError> {
        let found = discover(&self.paths);
        found.unreadable.iter().for_each(|reason| console::line(&format!("skipped: {reason}")));
        if found.skipped.count() > 0 {
            console::line(&format!("passed over, because they are no documents: {}", found.skipped));
        }
        if found.documents.is_empty() {
            let reason = "no documents found; files that are named are taken as they are, of folders those with a known extension";
            return Err(CliError::Usage(reason.to_owned()));
        }
        Ok(found)
    }

    fn model_directory(&self) -> Result<PathBuf, CliError> {
        model::find(self.model.as_deref()).map_err(CliError::Usage)
    }

    async fn process(
        &self,
        store: Arc<dyn Store>,
        engine: Arc<dyn Engine>,
        prompter: Prompter,
        jobs: Vec<NewJob>,
    ) -> Result<Status, CliError> {
        let done_before = take_in(&*store, &jobs).await?;
        let progress = Arc::new(RunProgress::new(&jobs, &done_before));
        let ids: Vec<JobId> = jobs.iter().map(|new| new.job.id).collect();
        let (handle, shutdown) = shutdown::channel();
        shutdown::on_signals(handle, told).map_err(|error| CliError::Internal(format!("signals: {error}")))?;
        let parts = Parts {
            store: store.clone(),
            documents: Arc::new(FileSource),
            prompter: Arc::new(prompter),
            engine,
            events: progress.clone(),
        };
        let ended = Pipeline::new(parts, settings(ids.clone())).run(shutdown.clone()).await;
        progress.finish();
        ended.map_err(pipeline_error)?;
        let status = self.print(&*store, &ids, &done_before, &shutdown).await;
        store.close().await;
        status
    }

    async fn print(
        &self,
        store: &dyn Store,
        ids: &[JobId],
        done_before: &[JobId],
        shutdown: &Shutdown,
    ) -> Result<Status, CliError> {
        let mut records = Vec::with_capacity(ids.len());
        for id in ids {
            if let Some(detail) = store.show(*id).await? {
                records.push(output::Record::new(&detail, done_before.contains(id)));
            }
        }
        output::print(&records, self.format, self.out.as_deref())?;
        if shutdown.phase() != Phase::Working {
            console::line("stopped; the same command goes on where this one ended");
        }
        let all = records.iter().all(|record| record.state == JobState::Succeeded);
        Ok(if all { Status::Done } else { Status::SomeFailed })
    }
}

/// Enqueues all jobs; those that had failed before get another chance. Returns those that were done before.
async fn take_in(store: &dyn Store, jobs: &[NewJob]) -> Result<Vec<JobId>, CliError> {
    let (mut done, mut again) = (Vec::new(), Vec::new());
    for (new, answer) in jobs.iter().zip(store.enqueue(jobs).await?) {
        match answer {
            Enqueued::Duplicate { state: JobState::Succeeded } => done.push(new.job.id),
            Enqueued::Duplicate { state } if state.is_final() => again.push(new.job.id),
            Enqueued::Duplicate { .. } | Enqueued::Inserted => {}
            // The id is derived from the payload.
            Enqueued::Conflict => {
                return Err(CliError::Internal(format!("{}: another job has the identity of this one", new.origin)));
            }
        }
    }
    if !again.is_empty() {
        store.replay(&Replay::Jobs(again)).await?;
    }
    Ok(done)
}

fn settings(only: Vec<JobId>) -> Settings {
    Settings {
        worker: WorkerId::unique("local", process::id()),
        lease: LEASE,
        ahead: 1,
        poll: Duration::from_millis(50),
        only: Some(only),
        models: Vec::new(),
        claim_at_most_bytes: None,
        documents_at_most_bytes: DOCUMENT_AT_MOST_BYTES,
        retry: RetryPolicy::local(),
        grace: GRACE,
    }
}

pub(super) fn prompter(directory: &std::path::Path) -> Result<Prompter, CliError> {
    let usage = |error: &dyn std::error::Error| CliError::Usage(error.to_string());
    let tokenizer = Tokenizer::load(directory).map_err(|error| usage(&error))?;
    let frame = ChatFrame::load(directory).map_err(|error| usage(&error))?;
    Prompter::new(tokenizer, &frame).map_err(|error| usage(&error))
}

fn told(phase: Phase) {
    match phase {
        Phase::Working => {}
        Phase::Draining => {
            console::line("stopping: what is being worked on may end within a few seconds; Ctrl-C again stops at once")
        }
        Phase::Stopping => {
            // Nothing is lost by it: the next run finds everything in the database.
            console::line("stopped at once; the same command goes on where this one ended");
            process::exit(1);
        }
    }
}

fn pipeline_error(error: PipelineError) -> CliError {
    match error {
        PipelineError::Store(error) => error.into(),
        error => CliError::Internal(error.to_string()),
    }
}
