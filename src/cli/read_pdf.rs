//! `apbd read-pdf`: a PDF document on standard input, its text on standard output. Started for each PDF, in a process of its own.

use std::io;

use super::{CliError, Status};
use crate::document::pdf;

/// Arguments of `apbd read-pdf`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address space.
    #[arg(long, value_name = "MIB")]
    memory_mib: Option<u64>,
    /// Time on a processor.
    #[arg(long, value_name = "SECONDS")]
    processor_s: Option<u64>,
}

impl Args {
    /// Answers, and ends.
    pub fn execute(self) -> Result<Status, CliError> {
        let usual = pdf::Limits::default();
        let limits = pdf::Limits {
            memory_bytes: self.memory_mib.map_or(usual.memory_bytes, |mib| mib << 20),
            processor_s: self.processor_s.unwrap_or(usual.processor_s),
        };
        let answered = pdf::answer(io::stdin().lock(), io::stdout().lock(), limits);
        answered.map(|()| Status::Done).map_err(|error| CliError::Internal(format!("reading a PDF: {error}")))
    }
}
