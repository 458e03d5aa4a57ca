//! Files of this machine. Their entity tag is the digest of their bytes, so a job that was made for some bytes gets those or none.
//!
//! Invariant: never waits for a pipe or a device: only regular files are opened for reading.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use async_trait::async_trait;

use super::{DocumentSource, FetchError, Fetched};
use crate::job::{Digest, DocumentRef, DocumentUri};

/// The entity tag of a file with these bytes.
pub fn entity_tag(digest: &Digest) -> String {
    format!("sha256:{digest}")
}

/// Reads files.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileSource;

#[async_trait]
impl DocumentSource for FileSource {
    async fn fetch(&self, document: &DocumentRef, at_most: u64) -> Result<Fetched, FetchError> {
        let DocumentUri::File { path } = &document.uri else {
            return Err(FetchError::NotAllowed { place: document.uri.to_string() });
        };
        let (path, pinned) = (path.clone(), document.etag.clone());
        let place = path.display().to_string();
        let reading = tokio::task::spawn_blocking(move || read(&path, at_most, pinned.as_deref()));
        let ended = |error: tokio::task::JoinError| FetchError::Unavailable { place, reason: error.to_string() };
        reading.await.map_err(ended)?
    }
}

fn read(path: &Path, at_most: u64, pinned: Option<&str>) -> Result<Fetched, FetchError> {
    let place = || path.display().to_string();
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => FetchError::NotFound { place: place() },
        ErrorKind::PermissionDenied => FetchError::Forbidden { place: place() },
        _ => FetchError::Unavailable { place: place(), reason: error.to_string() },
    };
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_file() {
        let found = if kind.is_dir() { "a folder" } else { "a pipe or a device" };
        return Err(FetchError::NotAFile { place: place(), found });
    }
    let mut bytes = Vec::new();
    // One byte more than allowed tells that there is more.
    File::open(path).and_then(|file| file.take(at_most.saturating_add(1)).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > at_most {
        return Err(FetchError::TooLarge { place: place(), at_most });
    }
    let etag = entity_tag(&Digest::of_bytes(&bytes));
    match pinned {
        Some(pinned) if pinned != etag => Err(FetchError::Changed { place: place() }),
        _ => Ok(Fetched { bytes, etag: Some(etag), ..Fetched::default() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::ErrorCode;

    fn document(path: &Path, etag: Option<String>) -> DocumentRef {
        let uri = DocumentUri::from_path(path).expect("an absolute path");
        DocumentRef { uri, version_id: None, etag, media_type: None }
    }

    async fn code(path: &Path, at_most: u64, etag: Option<String>) -> ErrorCode {
        FileSource.fetch(&document(path, etag), at_most).await.expect_err("refused").code()
    }

    #[tokio::test]
    async fn only_the_bytes_that_were_named_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a b.txt");
        fs::write(&path, "words").expect("written");
        let fetched = FileSource.fetch(&document(&path, None), 5).await.expect("read");
        assert_eq!(fetched.bytes, b"words");
        let pinned = FileSource.fetch(&document(&path, fetched.etag.clone()), 5).await.expect("read");
        assert_eq!(pinned, fetched);
        fs::write(&path, "other").expect("written");
        assert_eq!(code(&path, 5, fetched.etag).await, ErrorCode::SourceChanged);
        assert_eq!(code(&path, 4, None).await, ErrorCode::DocumentTooLarge);
    }

    #[tokio::test]
    async fn what_is_no_file_is_told_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(code(&folder.path().join("gone.txt"), 9, None).await, ErrorCode::DocumentNotFound);
        assert_eq!(code(folder.path(), 9, None).await, ErrorCode::MediaTypeUnsupported);
        assert_eq!(code(Path::new("/dev/zero"), 9, None).await, ErrorCode::MediaTypeUnsupported);
    }
}
