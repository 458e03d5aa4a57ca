//! Files mapped read-only: weights are read where they lie, never copied to the heap first.
//!
//! Invariant: a mapping is never written to, and lives as long as every slice taken from it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// A whole file as one slice of bytes.
#[derive(Debug)]
pub struct MappedFile {
    /// Absent for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps `path`. The error names the path.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(named)?;
        let length = file.metadata().map_err(named)?.len();
        if length == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is read-only and private to this value. The kernel cannot stop another process from
        // changing the file underneath: bytes could then change between two reads, or reading past a truncated end
        // could kill the process. Weights are installed once and replaced by renaming a new file over the old one,
        // which leaves this mapping intact; whoever edits one in place while a daemon uses it breaks that contract.
        // Nothing here relies on the bytes holding still: numbers of any value are checked after they are copied.
        let map = unsafe { Mmap::map(&file) }.map_err(named)?;
        Ok(Self { map: Some(map) })
    }

    /// The file's contents.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::MappedFile;

    #[test]
    fn a_mapped_file_has_the_bytes_of_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, b"some bytes").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"some bytes");
    }

    #[test]
    fn an_empty_file_has_no_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(MappedFile::open(file.path()).unwrap().bytes().is_empty());
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = MappedFile::open(directory.path().join("absent.safetensors")).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        assert!(error.to_string().contains("absent.safetensors"), "{error}");
    }
}
