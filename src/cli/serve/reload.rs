//! SIGHUP: the daemon drains as for SIGTERM, and starts again in the same process with its configuration as it is then. There is no second way to
//! come to a configuration than to start with it.
//!
//! Invariant: a configuration with faults changes nothing; they are said, and the daemon goes on with the one that it has.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use super::load;
use crate::cli::CliError;
use crate::pipeline::shutdown::ShutdownHandle;

/// Whether the daemon is to start again when it has ended.
#[derive(Clone, Default)]
pub(super) struct Reload(Arc<AtomicBool>);

impl Reload {
    /// Listens for SIGHUP for as long as the runtime lives.
    pub fn on_hangup(config: PathBuf, shutdown: ShutdownHandle) -> io::Result<Self> {
        let reload = Self::default();
        let (asked, mut hangup) = (reload.clone(), signal(SignalKind::hangup())?);
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                match load(&config) {
                    Ok(_) => {
                        info!("starting again with the configuration as it is now");
                        asked.0.store(true, Ordering::Relaxed);
                        shutdown.advance();
                        return;
                    }
                    Err(error) => warn!(error.message = %error, "the configuration is not taken, nothing has changed"),
                }
            }
        });
        Ok(reload)
    }

    /// Whether SIGHUP came, and the configuration was in order.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Becomes the program anew, as it was called; comes back only if that fails.
pub(super) fn start_again() -> CliError {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_else(|| "apbd".into());
    let error = Command::new(&program).args(arguments).exec();
    CliError::Internal(format!("{} could not be started again: {error}", program.display()))
}
