//! The watch over one rank: what NCCL says on its own, collectives that do not end, peers that gave up.
//!
//! A rank's thread may be deep in a wait for its device, which waits for a peer. The watch ends such a wait by aborting the rank's communicator,
//! after it has said why where every rank can see it.
//!
//! Invariant: why is known before the device is let go, so that nobody takes what an aborted collective left for a result.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::shared::{Shared, device_error};
use crate::comm::CommError;

/// Time between two looks: far shorter than any deadline, far longer than a look takes.
const INTERVAL: Duration = Duration::from_millis(5);

/// Runs until the rank's end is dropped or the communicator has ended.
pub(super) fn watch(shared: &Shared) {
    while !shared.closing.load(Ordering::Acquire) {
        if shared.meeting.ended(shared.rank, INTERVAL).is_some() {
            return shared.abort_device();
        }
        if let Err(error) = look(shared) {
            shared.fail_later(error);
            return shared.abort_device();
        }
    }
}

fn look(shared: &Shared) -> Result<(), CommError> {
    // One who is at work with the communicator looks for himself.
    if let Ok(handle) = shared.handle.try_lock()
        && let Some(handle) = &*handle
    {
        shared.nccl.poll(handle).map_err(|reason| CommError::Device { op: "NCCL", reason })?;
    }
    let mut under_way = shared.lock_under_way();
    while let Some(oldest) = under_way.front() {
        if oldest.mark.has_passed().map_err(device_error(oldest.op))? {
            under_way.pop_front();
            continue;
        }
        if shared.until(oldest.since) < Instant::now() {
            return Err(shared.timed_out(oldest.op));
        }
        break;
    }
    Ok(())
}
