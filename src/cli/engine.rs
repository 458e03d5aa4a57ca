//! `apbd engine`: the model in a process of its own, spoken to over its standard input. Started by `apbd serve`.

use std::path::PathBuf;

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
    /// Serves until the other side closes.
    pub fn execute(self) -> Result<Status, CliError> {
        let open = || self.device.open(&self.model, self.heads.as_deref()).map_err(|error| error.to_string());
        child::serve(open).map_err(|error| CliError::Internal(format!("the daemon's socket: {error}")))?;
        Ok(Status::Done)
    }
}
