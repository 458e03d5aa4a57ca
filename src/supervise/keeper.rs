//! The thread that keeps a child there: whatever ended the last one, and whether there is work or not.
//!
//! Invariant: only this thread starts children after the first; while the breaker is open it starts none.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::process::Process;
use super::state::Supervisor;

/// Pause between two tries to start a child, while the breaker allows them.
const START_PAUSE: Duration = Duration::from_secs(1);
/// How often a child that nobody speaks to is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Keeps a child there until nobody needs it.
pub(super) fn keep(supervisor: &Arc<Supervisor>) {
    let mut not_before = Instant::now();
    while !supervisor.stop.load(Ordering::Relaxed) {
        if let Some((process, reason)) = idle_and_ended(supervisor) {
            supervisor.give_up(&process, "died_idle", &reason, None);
        }
        let state = supervisor.state();
        let closed = state.breaker.open_for(Instant::now());
        let left = closed.unwrap_or_default().max(not_before.saturating_duration_since(Instant::now()));
        if state.process().is_some() || !left.is_zero() {
            let wait = if state.process().is_some() { LOOK } else { left.min(LOOK) };
            drop(supervisor.wait(state, wait));
            continue;
        }
        drop(state);
        start(supervisor);
        not_before = Instant::now() + START_PAUSE;
    }
}

/// A child that ended, or can do nothing any more, with nobody in it who would notice; and what there is to say of it.
fn idle_and_ended(supervisor: &Supervisor) -> Option<(Arc<Process>, String)> {
    let state = supervisor.state();
    let process = state.process().filter(|_| state.flights.running() == 0)?;
    let ended = || process.has_ended().then(|| "it ended while it was idle".to_owned());
    let reason = process.over().map(|reason| format!("while it was idle: {reason}")).or_else(ended)?;
    Some((process.clone(), reason))
}

fn start(supervisor: &Supervisor) {
    match supervisor.options.start_child(&supervisor.stop) {
        Ok((process, info)) if info.model_digest == supervisor.info.model_digest => supervisor.started(process, &info),
        Ok(_) => {
            let reason = "its model is not the one the daemon started with; restart the daemon";
            supervisor.not_started(reason.to_owned());
        }
        Err(_) if supervisor.stop.load(Ordering::Relaxed) => {}
        Err(reason) => supervisor.not_started(reason),
    }
}
