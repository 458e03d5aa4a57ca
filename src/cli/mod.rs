//! The command line: one file a subcommand, one exit code a kind of ending.
//!
//! A subcommand is a `clap::Args` struct with `execute(self) -> Result<Status, CliError>`; one that needs the asynchronous
//! runtime asks [`runtime`] for it. Data goes to stdout through [`print`], progress and logs go to stderr.
//!
//! Invariant: only here is something parsed from arguments or printed; the exit codes are those of [`Status`] and [`CliError`].

mod attention;
pub mod bench;
pub mod cancel;
pub mod check;
mod database;
mod device;
pub mod engine;
pub mod eval;
mod execution;
pub mod forget;
pub mod forward;
pub mod heads;
pub mod jobs;
pub mod migrate;
pub mod node;
mod place;
pub mod read_pdf;
pub mod replay;
pub mod report;
pub mod run;
pub mod serve;
pub mod show;
pub mod submit;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::telemetry::{LogOptions, TelemetryError};

/// Batch processing of long documents with APB, sequence-parallel approximate attention.
#[derive(Debug, Parser)]
#[command(name = "apbd", version, max_term_width = 100)]
pub struct Cli {
    /// What goes to stderr.
    #[command(flatten)]
    pub log: LogOptions,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Process files and folders on this machine; needs no service.
    Run(run::Args),
    /// Serve: take jobs from RabbitMQ and watched folders, until told to stop.
    Serve(serve::Args),
    /// Check a configuration, and everything that it connects to.
    Check(check::Args),
    /// Send a job to the queue.
    Submit(submit::Args),
    /// Be another node of a group on several machines; the first one serves.
    Node(node::Args),
    /// The engine's own process; started by `serve`.
    #[command(hide = true)]
    Engine(engine::Args),
    /// The process that reads one PDF document; started for each.
    #[command(hide = true)]
    ReadPdf(read_pdf::Args),
    /// List jobs.
    Jobs(jobs::Args),
    /// Show everything about a job.
    Show(show::Args),
    /// Cancel jobs, also running ones.
    Cancel(cancel::Args),
    /// Queue jobs again that failed.
    Replay(replay::Args),
    /// Delete what ended long ago from the database.
    Forget(forget::Args),
    /// Print reports: backlog, throughput, latency, tokens, failures.
    Report(report::Args),
    /// Bring the database's schema up to date.
    Migrate(migrate::Args),
    /// Run token ids through a model and print logits, for comparison with other implementations.
    Forward(forward::Args),
    /// Ask questions with known answers under several attentions: accuracy, speed and tokens side by side.
    Eval(eval::Args),
    /// Measure the engine's speed on a GPU, with random weights of real models' shapes.
    Bench(bench::Args),
    /// Convert published retaining heads.
    Heads(heads::Args),
}

impl Command {
    /// Runs the subcommand to its end.
    pub fn execute(self) -> Result<Status, CliError> {
        match self {
            Self::Run(args) => args.execute(),
            Self::Serve(args) => args.execute(),
            Self::Check(args) => args.execute(),
            Self::Submit(args) => args.execute(),
            Self::Node(args) => args.execute(),
            Self::Engine(args) => args.execute(),
            Self::ReadPdf(args) => args.execute(),
            Self::Jobs(args) => args.execute(),
            Self::Show(args) => args.execute(),
            Self::Cancel(args) => args.execute(),
            Self::Replay(args) => args.execute(),
            Self::Forget(args) => args.execute(),
            Self::Report(args) => args.execute(),
            Self::Migrate(args) => args.execute(),
            Self::Forward(args) => args.execute(),
            Self::Eval(args) => args.execute(),
            Self::Bench(args) => args.execute(),
            Self::Heads(args) => args.execute(),
        }
    }
}

/// How a command ended that could do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// All was done.
    Done,
    /// Some jobs failed, or were left undone because the run was interrupted.
    SomeFailed,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        match status {
            Status::Done => Self::SUCCESS,
            Status::SomeFailed => Self::from(1),
        }
    }
}

/// Why a command could not do its work. The message says what, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line, the environment, a config file or a file named there is at fault.
    #[error("{0}")]
    Usage(String),
    /// A service that is needed does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else: a full disk, a fault of this program.
    #[error("{0}")]
    Internal(String),
}

impl CliError {
    /// The exit code scripts depend on (those of sysexits.h).
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(64),
            Self::Unavailable(_) => ExitCode::from(69),
            Self::Internal(_) => ExitCode::from(70),
        }
    }
}

impl From<TelemetryError> for CliError {
    fn from(error: TelemetryError) -> Self {
        Self::Usage(error.to_string())
    }
}

/// Prints what clap has to say: help and version to stdout (exit 0), a usage error to stderr (exit 64).
pub fn explain(refusal: &clap::Error) -> ExitCode {
    // A closed pipe must not turn help into a failure.
    let _ = refusal.print();
    if refusal.use_stderr() { CliError::Usage(String::new()).exit_code() } else { ExitCode::SUCCESS }
}

/// Writes data to stdout. That the reader has gone (`apbd jobs | head`) is not an error.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Internal(format!("stdout: {error}"))),
        _ => Ok(()),
    }
}

/// The asynchronous runtime, for commands that need one.
pub fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("apbd-io")
        .worker_threads(2)
        .build()
        .map_err(|error| CliError::Internal(format!("could not start the runtime: {error}")))
}
