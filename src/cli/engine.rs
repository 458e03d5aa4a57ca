//! `apbd engine`: the model in a process of its own, spoken to over its standard input. Started by `apbd serve`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{process, thread};

use super::device::DeviceArgs;
use super::{CliError, Status};
use crate::engine::Following;
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
            let leaves = heed_stdin()?;
            let terms = Following { joined: &say_joined, leaves: &leaves };
            return self.device.follow(&self.model, self.heads.as_deref(), &terms).map(|()| Status::Done);
        }
        let open = || self.device.open(&self.model, self.heads.as_deref()).map_err(|error| error.to_string());
        child::serve(open).map_err(|error| CliError::Internal(format!("the daemon's socket: {error}")))?;
        Ok(Status::Done)
    }
}

/// Ends the process when whoever started it is gone, whatever it is at. What is said before asks it to leave between two documents.
fn heed_stdin() -> Result<Arc<AtomicBool>, CliError> {
    let leaves = Arc::new(AtomicBool::new(false));
    let asked = leaves.clone();
    let heed = move || {
        let mut word = [0; 64];
        while io::stdin().lock().read(&mut word).is_ok_and(|bytes| bytes > 0) {
            asked.store(true, Ordering::Relaxed);
        }
        process::exit(0)
    };
    let spawned = thread::Builder::new().name("apbd-stdin".to_owned()).spawn(heed);
    spawned.map_err(|error| CliError::Internal(format!("the thread that waits for its end: {error}")))?;
    Ok(leaves)
}

/// Tells whoever started it that all nodes are there.
fn say_joined() {
    // One that does not listen is about to end this process.
    let _ = writeln!(io::stdout(), "joined");
}
