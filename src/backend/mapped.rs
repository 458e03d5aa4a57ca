//! A file as bytes in memory, read by the operating system as they are touched.
//!
//! Invariant: the mapping is read-only and lives as long as the bytes that were lent from it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

/// A read-only memory-mapped file.
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole file. An empty one gives no bytes.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the mapping is private to this process and never written through. A file that somebody truncates while it is mapped
        // would end the process by SIGBUS; weights are written once and then left alone, which the README asks for.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self { map })
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
