//! What is at a place: objects below a prefix, or files below a folder, page by page.
//!
//! Invariant: one odd name costs nothing but itself; a link or a hidden file is no drop; memory is bounded by a page.

use std::fs::{Metadata, ReadDir};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::LookError;
use super::profile::SIDECAR;
use crate::job::{Digest, DocumentUri};
use crate::objects::{Listed, ObjectClient};
use crate::store::DropSighting;

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
    /// Why it cannot be read.
    pub fault: Option<String>,
}

impl Seen {
    /// An object. With the same tag and length it is the same version, whenever it was written.
    pub fn object(alias: &str, bucket: &str, object: Listed) -> Self {
        let mark = object.etag.as_ref().or(object.last_modified.as_ref()).cloned().unwrap_or_default();
        Self {
            uri: format!("s3://{alias}/{bucket}/{}", object.key),
            version: format!("{mark} {}", object.size),
            etag: object.etag,
            size: object.size,
            fault: (!object.is_exact).then(|| "its key is not UTF-8".to_owned()),
        }
    }

    /// As the store remembers it.
    pub fn sighting(self, has_sidecars: bool) -> DropSighting {
        let document = self.uri.strip_suffix(SIDECAR).filter(|_| has_sidecars);
        let fault = self.fault.or_else(|| self.uri.parse::<DocumentUri>().err());
        DropSighting {
            file: Digest::of_bytes(document.unwrap_or(&self.uri).as_bytes()),
            is_sidecar: document.is_some(),
            version: self.version,
            etag: self.etag,
            size_bytes: self.size,
            fault,
            uri: self.uri,
        }
    }
}

/// What tells one version of a file of this machine from others.
pub(super) fn file_version(about: &Metadata) -> String {
    format!("{} {}.{:09} {}", about.ino(), about.mtime(), about.mtime_nsec(), about.len())
}

/// A look at a place.
pub(super) enum Listing {
    /// Objects, and where the next page begins.
    Objects { client: ObjectClient, bucket: String, prefix: String, next: Option<Option<String>> },
    /// Folders that are still to be read.
    Folders(Box<Folders>),
}

/// A walk through folders.
pub(super) struct Folders {
    root: PathBuf,
    /// The one that is being read.
    open: Option<(PathBuf, ReadDir)>,
    left: Vec<PathBuf>,
}

impl Listing {
    /// Begins a look.
    pub fn open(at: &DocumentUri, stores: &[ObjectClient]) -> Result<Self, LookError> {
        match at {
            DocumentUri::File { path } => {
                Ok(Self::Folders(Box::new(Folders { root: path.clone(), open: None, left: vec![path.clone()] })))
            }
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
                if page.next.is_some() && page.next == from {
                    return Err(LookError::Folder("the server's listing does not come to an end".to_owned()));
                }
                *next = page.next.map(Some);
                let alias = client.alias().to_owned();
                // What stands for a folder in some programs is no document.
                let files = page.objects.into_iter().filter(|object| object.size > 0 || !object.key.ends_with('/'));
                Ok(Some(files.map(|object| Seen::object(&alias, bucket, object)).collect()))
            }
            Self::Folders(folders) => {
                let taken = Folders { root: PathBuf::new(), open: None, left: Vec::new() };
                let mut walk = std::mem::replace(&mut **folders, taken);
                let reading = tokio::task::spawn_blocking(move || {
                    let page = walk.page();
                    (walk, page)
                });
                let (walk, page) = reading.await.map_err(|error| LookError::Folder(error.to_string()))?;
                **folders = walk;
                page
            }
        }
    }
}

impl Folders {
    fn page(&mut self) -> Result<Option<Vec<Seen>>, LookError> {
        let mut page = Vec::new();
        while page.len() < PAGE {
            let Some((folder, entries)) = &mut self.open else {
                let Some(folder) = self.left.pop() else { break };
                match std::fs::read_dir(&folder) {
                    Ok(entries) => self.open = Some((folder, entries)),
                    // A folder below that has gone since, or is somebody's own, costs only itself.
                    Err(error) if folder != self.root && gone_or_closed(error.kind()) => {}
                    Err(error) => return Err(LookError::Folder(format!("{}: {error}", folder.display()))),
                }
                continue;
            };
            match entries.next() {
                None => self.open = None,
                Some(Err(error)) => return Err(LookError::Folder(format!("{}: {error}", folder.display()))),
                Some(Ok(entry)) => {
                    // A file that has gone since is no fault.
                    let Ok(about) = entry.metadata() else { continue };
                    if entry.file_name().as_encoded_bytes().starts_with(b".") {
                        continue;
                    }
                    if about.is_dir() {
                        self.left.push(entry.path());
                    } else if about.is_file()
                        && let Some(uri) = DocumentUri::from_path(&entry.path())
                    {
                        let version = file_version(&about);
                        page.push(Seen { uri: uri.to_string(), version, etag: None, size: about.len(), fault: None });
                    }
                }
            }
        }
        Ok((!page.is_empty() || self.open.is_some() || !self.left.is_empty()).then_some(page))
    }
}

fn gone_or_closed(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied)
}
