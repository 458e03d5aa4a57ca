//! `apbd engine`: the model in a process of its own, spoken to over its standard input. Started by `apbd serve`.

use std::path::PathBuf;
use std::{io, process, thread};

use super::device::DeviceArgs;
use super::{CliError, Status};
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
    #[command(flatten)]
    device: DeviceArgs,
}

impl Args {
    /// Serves until the other side closes; on another node than the first of a group until that has no more to do.
    pub fn execute(self) -> Result<Status, CliError> {
        if self.device.nodes.is_follower() {
            end_with_stdin()?;
            return self.device.follow(&self.model, self.heads.as_deref()).map(|()| Status::Done);
        }
        let open = || self.device.open(&self.model, self.heads.as_deref()).map_err(|error| error.to_string());
        child::serve(open).map_err(|error| CliError::Internal(format!("the daemon's socket: {error}")))?;
        Ok(Status::Done)
    }
}

/// Ends the process when whoever started it is gone, whatever it is at.
fn end_with_stdin() -> Result<(), CliError> {
    let wait = || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        process::exit(0)
    };
    let spawned = thread::Builder::new().name("apbd-stdin".to_owned()).spawn(wait);
    spawned.map(drop).map_err(|error| CliError::Internal(format!("the thread that waits for its end: {error}")))
}
