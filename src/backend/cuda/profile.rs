//! Where the device's time goes: an event before each operation, while somebody wants to know.
//!
//! Invariant: costs one atomic load an operation when nobody does; the times of all operations add up to the whole.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Cuda;
use super::driver::{Context, Event, Stream};
use crate::BackendError;

/// Marks that have been set since [`Cuda::start_profile`].
#[derive(Default)]
pub(super) struct Profile {
    wanted: AtomicBool,
    marks: Mutex<Vec<(&'static str, Event)>>,
    lane: Mutex<Vec<OnLane>>,
}

/// Work beside the computing.
struct OnLane {
    op: &'static str,
    begin: Event,
    end: Option<Event>,
}

impl Profile {
    /// Work begins on a lane.
    pub(super) fn lane_begins(&self, context: &Context, stream: &Stream, op: &'static str) -> Result<(), BackendError> {
        if !self.wanted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let begin = Event::new(context)?;
        begin.record(stream)?;
        self.lane.lock().unwrap_or_else(PoisonError::into_inner).push(OnLane { op, begin, end: None });
        Ok(())
    }

    /// The work that began last on a lane ends.
    pub(super) fn lane_ends(&self, context: &Context, stream: &Stream) -> Result<(), BackendError> {
        let mut lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(OnLane { end: end @ None, .. }) = lane.last_mut() {
            end.insert(Event::new(context)?).record(stream)?;
        }
        Ok(())
    }
}

impl Cuda {
    /// From here on every operation is timed.
    pub fn start_profile(&self) -> Result<(), BackendError> {
        self.profile.marks.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.profile.lane.lock().unwrap_or_else(PoisonError::into_inner).clear();
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

    /// The milliseconds of what ran beside the computing in the profile that was finished last, each from when its turn came to its end; it
    /// includes the wait for other devices.
    pub fn lane_profile(&self) -> Result<Vec<(&'static str, f32)>, BackendError> {
        let done = std::mem::take(&mut *self.profile.lane.lock().unwrap_or_else(PoisonError::into_inner));
        let time = |work: OnLane| {
            let end = work.end?;
            Some(end.synchronize().and_then(|()| work.begin.milliseconds_to(&end)).map(|ms| (work.op, ms)))
        };
        done.into_iter().filter_map(time).collect()
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
