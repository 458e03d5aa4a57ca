//! How far the host may run ahead of the device.
//!
//! Invariant: between two calls of [`Cuda::keep_pace`] the host waits for what was issued before the call [`AHEAD`] calls ago, and for no more.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::Event;
use crate::BackendError;

/// Stretches of work that may be under way: enough that the device never waits, few enough that a cancel is felt.
const AHEAD: usize = 2;

/// Events at the ends of the latest stretches.
#[derive(Default)]
pub(super) struct Pace {
    ends: Mutex<VecDeque<Event>>,
}

impl Cuda {
    pub(super) fn keep_pace(&self) -> Result<(), BackendError> {
        let mut ends = self.pace.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let event = match ends.len() {
            AHEAD => {
                let oldest = ends.pop_front().expect("as many as may be ahead");
                oldest.synchronize()?;
                oldest
            }
            _ => Event::new(&self.context)?,
        };
        event.record(&self.stream)?;
        ends.push_back(event);
        Ok(())
    }
}
