//! Where the device's time goes: an event before each operation, while somebody wants to know.
//!
//! Invariant: costs one atomic load an operation when nobody does; the times of all operations add up to the whole.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::Event;
use crate::backend::BackendError;

/// Marks that have been set since [`Cuda::start_profile`].
#[derive(Default)]
pub(super) struct Profile {
    wanted: AtomicBool,
    marks: Mutex<Vec<(&'static str, Event)>>,
}

impl Cuda {
    /// From here on every operation is timed.
    pub fn start_profile(&self) -> Result<(), BackendError> {
        self.profile.marks.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.profile.wanted.store(true, Ordering::Relaxed);
        self.mark("start")
    }

    /// Waits for the device and tells the milliseconds of each operation, in the order of their issue; what passed before
    /// the first one is `start`.
    pub fn finish_profile(&self) -> Result<Vec<(&'static str, f32)>, BackendError> {
        self.mark("end")?;
        self.profile.wanted.store(false, Ordering::Relaxed);
        self.stream.synchronize("profile")?;
        let marks = std::mem::take(&mut *self.profile.marks.lock().unwrap_or_else(PoisonError::into_inner));
        marks.windows(2).map(|pair| Ok((pair[0].0, pair[0].1.milliseconds_to(&pair[1].1)?))).collect()
    }

    /// An operation starts here.
    pub(super) fn mark(&self, op: &'static str) -> Result<(), BackendError> {
        if !self.profile.wanted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let event = Event::new(&self.context)?;
        event.record(&self.stream)?;
        self.profile.marks.lock().unwrap_or_else(PoisonError::into_inner).push((op, event));
        Ok(())
    }
}
