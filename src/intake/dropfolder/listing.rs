//! What is at a place: objects below a prefix, or files below a folder, page by page.
//!
//! Invariant: one odd name costs nothing but itself; a link or a hidden file is no drop.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::LookError;
use crate::job::DocumentUri;
use crate::objects::ObjectClient;

/// Files of a folder in one page.
const PAGE: usize = 1000;

/// A file at the place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    /// Its URI, which may be one that no job can name.
    pub uri: String,
    /// What tells this version of it from others.
    pub version: String,
    /// Entity tag, of an object.
    pub etag: Option<String>,
    /// Bytes.
    pub size: u64,
}

/// A look at a place.
pub(super) enum Listing {
    /// Objects, and where the next page begins.
    Objects { client: ObjectClient, bucket: String, prefix: String, next: Option<Option<String>> },
    /// Folders that are still to be read.
    Folders(Vec<PathBuf>),
}

impl Listing {
    /// Begins a look.
    pub fn open(at: &DocumentUri, stores: &[ObjectClient]) -> Result<Self, LookError> {
        match at {
            DocumentUri::File { path } => Ok(Self::Folders(vec![path.clone()])),
            DocumentUri::S3 { store, bucket, key } => {
                let client = stores.iter().find(|client| client.alias() == store);
                let client = client.ok_or_else(|| LookError::Folder(format!("no store is named {store}")))?.clone();
                Ok(Self::Objects { client, bucket: bucket.clone(), prefix: key.clone(), next: Some(None) })
            }
        }
    }

    /// The next files; nothing at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Seen>>, LookError> {
        match self {
            Self::Objects { client, bucket, prefix, next } => {
                let Some(from) = next.take() else { return Ok(None) };
                let page = client.list(bucket, prefix, from.as_deref()).await?;
                *next = page.next.map(Some);
                let alias = client.alias().to_owned();
                let seen = page.objects.into_iter().filter(|object| !object.key.ends_with('/')).map(|object| Seen {
                    uri: format!("s3://{alias}/{bucket}/{}", object.key),
                    version: format!(
                        "{} {}",
                        object.etag.as_deref().unwrap_or_default(),
                        object.last_modified.as_deref().unwrap_or_default()
                    ),
                    etag: object.etag,
                    size: object.size,
                });
                Ok(Some(seen.collect()))
            }
            Self::Folders(folders) => {
                let mut left = std::mem::take(folders);
                if left.is_empty() {
                    return Ok(None);
                }
                let reading = tokio::task::spawn_blocking(move || {
                    let mut page = Vec::new();
                    while page.len() < PAGE
                        && let Some(folder) = left.pop()
                    {
                        read(&folder, &mut left, &mut page)?;
                    }
                    Ok::<_, LookError>((left, page))
                });
                let (left, page) = reading.await.map_err(|error| LookError::Folder(error.to_string()))??;
                *folders = left;
                Ok(Some(page))
            }
        }
    }
}

fn read(folder: &Path, folders: &mut Vec<PathBuf>, page: &mut Vec<Seen>) -> Result<(), LookError> {
    let failed = |error: std::io::Error| LookError::Folder(format!("{}: {error}", folder.display()));
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // A file that has gone since is no fault.
        let Ok(about) = entry.metadata() else { continue };
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if about.is_dir() {
            folders.push(entry.path());
        } else if about.is_file() {
            let Some(uri) = DocumentUri::from_path(&entry.path()) else { continue };
            let version = format!("{} {}.{}", about.ino(), about.mtime(), about.mtime_nsec());
            page.push(Seen { uri: uri.to_string(), version, etag: None, size: about.len() });
        }
    }
    Ok(())
}
