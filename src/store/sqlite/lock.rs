//! One worker a file: an operating-system lock on `NAME.lock`, which goes with the process however it ends.
//!
//! Invariant: who holds the lock has written its process number into the file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::store::StoreError;

/// Held as long as it lives.
pub(super) struct WorkerLock {
    _file: File,
}

impl WorkerLock {
    /// Takes the lock of the database at `path`, or says who has it.
    pub fn take(path: &Path) -> Result<Self, StoreError> {
        let lock_path = lock_path(path);
        let failed = |error: std::io::Error| StoreError::File { path: lock_path.clone(), reason: error.to_string() };
        // What stands in it belongs to the holder until the lock is ours.
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(&lock_path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Only for the message; a holder that has not written yet stays unnamed.
                let _ = file.read_to_string(&mut holder);
                return Err(StoreError::InUse { path: path.to_owned(), holder: holder.trim().parse().ok() });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }
}

fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".lock");
    path.with_file_name(name)
}
