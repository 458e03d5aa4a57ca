//! `apbd heads convert`: published retaining heads to safetensors.

use std::path::PathBuf;

use crate::model::torch::convert_heads;

use super::{CliError, Status, print};

/// Arguments of `apbd heads`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Converts a PyTorch file of retaining heads to safetensors; executes nothing that is in it.
    Convert {
        /// PyTorch file (.bin, .pt) with `…self_attn.fc1.weight` and `…fc2.weight`.
        #[arg(value_name = "IN.bin")]
        from: PathBuf,
        /// File to write.
        #[arg(value_name = "OUT.safetensors")]
        to: PathBuf,
    },
}

impl Args {
    /// Converts the file.
    pub fn execute(self) -> Result<Status, CliError> {
        let Command::Convert { from, to } = self.command;
        let converted = convert_heads(&from, &to).map_err(|error| CliError::Usage(error.to_string()))?;
        let mut line = format!("{}: {} tensors of retaining heads", to.display(), converted.tensors);
        if converted.left_out > 0 {
            line.push_str(&format!("; {} tensors that belong to no head were left out", converted.left_out));
        }
        print(&format!("{line}\n"))?;
        Ok(Status::Done)
    }
}
