//! `apbd run`: documents on this machine, with no service.

use std::path::PathBuf;

use super::{CliError, Status};

/// Arguments of `apbd run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files and folders with documents.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
}

impl Args {
    /// Processes the documents.
    pub fn execute(self) -> Result<Status, CliError> {
        Ok(Status::Done)
    }
}
