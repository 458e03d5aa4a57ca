//! Device memory: one block taken from the driver at start, handed out in pieces.
//!
//! What does not fit is an error where it is asked for; nothing is allocated from the driver in mid-job. Pieces are freed on
//! drop and may be handed out again at once: all work is issued on one stream, so a later user's work comes after an earlier one's.
//! Invariant: pieces never overlap, and free pieces are never neighbours.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Context;
use crate::BackendError;

/// Alignment of pieces; more than any kernel or tensor map asks for.
const ALIGNMENT_BYTES: usize = 512;

/// The block.
pub(super) struct Arena {
    context: Arc<Context>,
    base: u64,
    bytes: usize,
    ledger: Mutex<Ledger>,
}

/// Free pieces: offset to length.
struct FreeList(BTreeMap<usize, usize>);

/// What is free now, and how little was since the last time somebody began to watch.
struct Ledger {
    free: FreeList,
    least: usize,
}

impl FreeList {
    /// Takes the smallest piece that is large enough, from its start.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let (&at, &length) =
            self.0.iter().filter(|&(_, &length)| length >= bytes).min_by_key(|&(_, &length)| length)?;
        self.0.remove(&at);
        if length > bytes {
            self.0.insert(at + bytes, length - bytes);
        }
        Some(at)
    }

    /// Puts a piece back and joins it with free neighbours.
    fn give(&mut self, mut at: usize, mut bytes: usize) {
        if let Some(next) = self.0.remove(&(at + bytes)) {
            bytes += next;
        }
        if let Some((&before, &length)) = self.0.range(..at).next_back()
            && before + length == at
        {
            at = before;
            bytes += length;
        }
        self.0.insert(at, bytes);
    }

    fn total(&self) -> usize {
        self.0.values().sum()
    }
}

impl Arena {
    /// Takes `bytes` from the device.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Arc<Self>, BackendError> {
        let bytes = bytes / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
        let base = context.allocate(bytes)?;
        let ledger = Mutex::new(Ledger { free: FreeList(BTreeMap::from([(0, bytes)])), least: bytes });
        Ok(Arc::new(Self { context: context.clone(), base, bytes, ledger }))
    }

    /// A piece of `bytes`; contents undefined.
    pub fn take(self: &Arc<Self>, op: &'static str, bytes: usize) -> Result<Piece, BackendError> {
        let rounded = bytes.max(1).next_multiple_of(ALIGNMENT_BYTES);
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = ledger.free.take(rounded).ok_or(BackendError::OutOfMemory { op, bytes })?;
        ledger.least = ledger.least.min(ledger.free.total());
        Ok(Piece { arena: self.clone(), offset, bytes: rounded })
    }

    /// Bytes that are free, in however many pieces.
    pub fn free_bytes(&self) -> usize {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).free.total()
    }

    /// Bytes that were in use at most since [`Arena::watch`].
    pub fn peak_bytes(&self) -> usize {
        self.bytes - self.ledger.lock().unwrap_or_else(PoisonError::into_inner).least
    }

    /// Begins to watch the peak anew.
    pub fn watch(&self) {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.least = ledger.free.total();
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: (1) every piece holds the arena, so none is left, and the stream has been synchronised when the backend was dropped.
        unsafe { self.context.free(self.base) };
    }
}

/// A piece of device memory, given back on drop.
pub(super) struct Piece {
    arena: Arc<Arena>,
    offset: usize,
    bytes: usize,
}

impl Piece {
    /// Device address.
    pub fn address(&self) -> u64 {
        self.arena.base + self.offset as u64
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.arena.ledger.lock().unwrap_or_else(PoisonError::into_inner).free.give(self.offset, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_become_one_piece_again() {
        let mut list = FreeList(BTreeMap::from([(0, 4096)]));
        let pieces: Vec<_> = (0..4).map(|_| list.take(1024).expect("it fits")).collect();
        assert_eq!(list.take(512), None);
        for i in [1, 3, 0, 2] {
            list.give(pieces[i], 1024);
        }
        assert_eq!(list.0, BTreeMap::from([(0, 4096)]));
    }

    #[test]
    fn the_smallest_piece_that_fits_is_taken() {
        let mut list = FreeList(BTreeMap::from([(0, 4096), (8192, 1024), (16384, 2048)]));
        assert_eq!(list.take(1024), Some(8192));
        assert_eq!(list.take(1536), Some(16384));
        assert_eq!(list.total(), 4096 + 512);
    }
}
