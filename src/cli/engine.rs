//! `apbd engine`: the model in a process of its own, spoken to over its standard input. Started by `apbd serve`.

use std::path::PathBuf;

use super::{CliError, Status};
use crate::engine::{LocalEngine, LocalOptions};
use crate::supervise::child;

/// Arguments of `apbd engine`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Retaining heads.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Ranks at most.
    #[arg(long, value_name = "N", default_value_t = 1)]
    ranks: usize,
    /// Threads of all ranks together.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Args {
    /// Serves until the other side closes.
    pub fn execute(self) -> Result<Status, CliError> {
        let mut options = LocalOptions { heads: self.heads, ranks: self.ranks, ..LocalOptions::default() };
        options.threads = self.threads.unwrap_or(options.threads);
        let open = || LocalEngine::open(&self.model, &options).map_err(|error| error.to_string());
        child::serve(open).map_err(|error| CliError::Internal(format!("the daemon's socket: {error}")))?;
        Ok(Status::Done)
    }
}
