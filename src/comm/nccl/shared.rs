//! What a rank shares with its watch: the communicator, where the ranks meet, and the collectives that the device may be at; how those are issued, waited
//! for and given up.
//!
//! Invariant: a communicator that has ended is never used again, and why is known before its device is let go.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::library::{Handle, Nccl, Progress, Transfer};
use crate::backend::BackendError;
use crate::backend::cuda::{Lane, Mark, Peers};
use crate::comm::CommError;
use crate::comm::meeting::Meeting;

/// How long a wait that is expected to be short spins before it sleeps.
const SPIN: Duration = Duration::from_micros(300);
/// How long it sleeps at a time after that.
const NAP: Duration = Duration::from_micros(50);

/// What a rank shares with its watch.
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) deadline: Duration,
    pub(super) nccl: &'static Nccl,
    pub(super) meeting: Meeting,
    /// Gone once aborted.
    pub(super) handle: Mutex<Option<Handle>>,
    /// Collectives that the device may not have passed yet, in their order.
    pub(super) under_way: Mutex<VecDeque<UnderWay>>,
    /// What this rank itself has met, until it is told to its caller.
    pub(super) met: Mutex<Option<CommError>>,
    pub(super) closing: AtomicBool,
    /// Where the devices reach into each other's memory.
    pub(super) peers: Option<Peers>,
    pub(super) lane: Lane,
}

/// When a wait has lasted too long: asked again and again, because it may come to be later.
pub(super) type Until<'a> = &'a dyn Fn() -> Instant;

pub(super) struct UnderWay {
    pub(super) op: &'static str,
    pub(super) since: Instant,
    pub(super) mark: Arc<Mark>,
}

pub(super) fn device_error(op: &'static str) -> impl Fn(BackendError) -> CommError {
    move |error| CommError::Device { op, reason: error.to_string() }
}

impl Shared {
    pub(super) fn lock_under_way(&self) -> MutexGuard<'_, VecDeque<UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when a collective may last that was asked for at `since`.
    pub(super) fn until(&self, since: Instant) -> Instant {
        since.max(self.meeting.progress()) + self.deadline
    }

    pub(super) fn timed_out(&self, op: &'static str) -> CommError {
        CommError::TimedOut { op, rank: self.rank, seconds: self.deadline.as_secs() }
    }

    /// Ends the communicator because of what this rank has met. What its caller is to be told comes back: what ended it first.
    pub(super) fn fail(&self, error: CommError) -> CommError {
        match self.meeting.fail(self.rank, &error) {
            true => error,
            false => self.check().err().unwrap_or(error),
        }
    }

    /// As [`Shared::fail`], for a device that failed in `op`.
    pub(super) fn broken(&self, op: &'static str) -> impl Fn(BackendError) -> CommError {
        move |error| self.fail(device_error(op)(error))
    }

    /// As [`Shared::fail`], for what NCCL says of `op`.
    fn refused(&self, op: &'static str) -> impl Fn(String) -> CommError {
        move |reason| self.fail(CommError::Device { op, reason })
    }

    /// As [`Shared::fail`], with nobody there to be told: the caller learns it at its next call.
    pub(super) fn fail_later(&self, error: CommError) {
        let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        if self.meeting.fail(self.rank, &error) {
            *met = Some(error);
        }
    }

    /// That the communicator has ended, in the words of this rank where it was the one that ended it.
    pub(super) fn own<T>(&self, result: Result<T, CommError>) -> Result<T, CommError> {
        result.map_err(|error| {
            let met = self.met.lock().unwrap_or_else(PoisonError::into_inner).take();
            met.unwrap_or(error)
        })
    }

    /// Whether the communicator still works.
    pub(super) fn check(&self) -> Result<(), CommError> {
        self.own(self.meeting.ended(self.rank, Duration::ZERO).map_or(Ok(()), Err))
    }

    pub(super) fn with_handle<T>(
        &self,
        op: &'static str,
        work: impl FnOnce(&Handle) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        match &*self.handle.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(handle) => work(handle),
            None => {
                self.check()?;
                Err(CommError::Device { op, reason: "the communicator has ended".to_owned() })
            }
        }
    }

    /// Lets the device go: what it does for the communicator stops where it is.
    pub(super) fn abort_device(&self) {
        if let Some(peers) = &self.peers {
            peers.end();
        }
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            // Should it fail, the device stays where it is, and the process is the last word.
            let _ = self.lane.bind("abort");
            let _ = self.nccl.abort(handle);
        }
    }

    /// Starts a collective beside the computing, after what has been computed, and notes it for the watch.
    ///
    /// # Safety
    /// 1. What the transfers touch is this device's memory, and stays allocated until the device's computing waits for the lane.
    pub(super) unsafe fn start(&self, op: &'static str, transfers: &[Transfer]) -> Result<Arc<Mark>, CommError> {
        let since = Instant::now();
        // SAFETY: (1) by the caller.
        let mark = unsafe { self.issue(op, transfers, &|| self.until(since)) }?;
        Ok(self.watched(op, since, mark))
    }

    /// Issues a collective among the computing, of which it takes its turn: for one that is awaited at once anyway.
    ///
    /// # Safety
    /// 1. What the transfers touch is this device's memory, allocated now.
    pub(super) unsafe fn compute(&self, op: &'static str, transfers: &[Transfer]) -> Result<(), CommError> {
        let since = Instant::now();
        self.lane.bind(op).map_err(self.broken(op))?;
        let computing = self.lane.computing().map_err(self.broken(op))?;
        // SAFETY: (1) by the caller, and memory is given back in the order of the computing; (2) the stream is the device's, which is current.
        unsafe { self.transfer(op, transfers, computing, &|| self.until(since)) }?;
        self.watch_computing(op, since)
    }

    /// Notes for the watch that a collective among the computing ends where that ends now.
    pub(super) fn watch_computing(&self, op: &'static str, since: Instant) -> Result<(), CommError> {
        self.watched(op, since, self.lane.mark_computing().map_err(self.broken(op))?);
        Ok(())
    }

    fn watched(&self, op: &'static str, since: Instant, mark: Mark) -> Arc<Mark> {
        let mark = Arc::new(mark);
        self.lock_under_way().push_back(UnderWay { op, since, mark: mark.clone() });
        mark
    }

    /// Issues transfers on the lane, after what has been computed.
    ///
    /// # Safety
    /// As for [`Shared::start`].
    pub(super) unsafe fn issue(
        &self,
        op: &'static str,
        transfers: &[Transfer],
        until: Until<'_>,
    ) -> Result<Mark, CommError> {
        self.lane.follow(op).map_err(self.broken(op))?;
        // SAFETY: (1) by the caller; (2) the lane is of the rank's device, which `follow` has made current.
        unsafe { self.transfer(op, transfers, self.lane.raw(), until) }?;
        self.lane.mark().map_err(self.broken(op))
    }

    /// # Safety
    /// As for [`Nccl::transfer`].
    unsafe fn transfer(
        &self,
        op: &'static str,
        transfers: &[Transfer],
        stream: *mut c_void,
        until: Until<'_>,
    ) -> Result<(), CommError> {
        if transfers.is_empty() {
            return Ok(());
        }
        self.with_handle(op, |handle| {
            // SAFETY: (1), (2) by the caller.
            let begun = unsafe { self.nccl.transfer(handle, transfers, stream) };
            self.issued(op, handle, begun.map_err(self.refused(op))?, until)
        })
    }

    /// Waits until what was begun has been issued to the device, which is usually at once.
    pub(super) fn issued(
        &self,
        op: &'static str,
        handle: &Handle,
        mut progress: Progress,
        until: Until<'_>,
    ) -> Result<(), CommError> {
        let begun = Instant::now();
        while progress == Progress::UnderWay {
            self.pause(op, begun, until)?;
            progress = self.nccl.poll(handle).map_err(self.refused(op))?;
        }
        Ok(())
    }

    /// Waits on the host until the device has passed a mark.
    pub(super) fn wait_for(&self, op: &'static str, mark: &Mark, until: Until<'_>) -> Result<(), CommError> {
        let begun = Instant::now();
        while !mark.has_passed().map_err(self.broken(op))? {
            self.pause(op, begun, until)?;
        }
        // What an aborted collective left is no result.
        self.check()
    }

    /// One turn of a wait that began at `begun`: ends it if the communicator has ended, or at `until`.
    fn pause(&self, op: &'static str, begun: Instant, until: Until<'_>) -> Result<(), CommError> {
        self.check()?;
        if Instant::now() >= until() {
            return Err(self.fail(self.timed_out(op)));
        }
        match begun.elapsed() < SPIN {
            true => thread::yield_now(),
            false => thread::sleep(NAP),
        }
        Ok(())
    }

    /// After a collective that could not be issued whole: its memory is about to be given back, and part of it may be under way.
    pub(super) fn give_up(&self) {
        self.abort_device();
        if let Ok(mark) = self.lane.mark() {
            // A device that takes no more work does none on that memory either.
            let _ = self.lane.rejoin(&mark);
        }
    }
}
