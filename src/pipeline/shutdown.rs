//! How a process is told to stop: first softly, then at once.
//!
//! Invariant: the phase only ever advances.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How far the stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No stop was asked for.
    Working,
    /// Nothing new is begun; what is unfinished after the grace goes back to the queue.
    Draining,
    /// Nothing is waited for any more.
    Stopping,
}

/// What everything that may have to stop listens to.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<Phase>);

/// The other end; dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct ShutdownHandle(watch::Sender<Phase>);

/// A handle and what listens to it.
pub fn channel() -> (ShutdownHandle, Shutdown) {
    let (sender, receiver) = watch::channel(Phase::Working);
    (ShutdownHandle(sender), Shutdown(receiver))
}

impl ShutdownHandle {
    /// One step further.
    pub fn advance(&self) -> Phase {
        self.0.send_modify(|phase| {
            *phase = match *phase {
                Phase::Working => Phase::Draining,
                Phase::Draining | Phase::Stopping => Phase::Stopping,
            };
        });
        *self.0.borrow()
    }
}

impl Shutdown {
    /// Where the stop is.
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Returns at the first signal.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns at the second.
    pub async fn stopping(&self) {
        self.reached(Phase::Stopping).await;
    }

    async fn reached(&self, phase: Phase) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|now| *now >= phase).await.is_err() {
            // Nobody is left who could ask for a stop.
            std::future::pending::<()>().await;
        }
    }
}

/// Advances `handle` at every SIGTERM and SIGINT, and calls `told` with the phase reached. For as long as the process lives.
pub fn on_signals(handle: ShutdownHandle, told: impl Fn(Phase) + Send + 'static) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            let asked = tokio::select! {
                asked = terminate.recv() => asked,
                asked = interrupt.recv() => asked,
            };
            if asked.is_none() {
                return;
            }
            told(handle.advance());
        }
    });
    Ok(())
}
