//! Where documents may be: buckets and prefixes of named stores, and folders of this machine.
//!
//! Invariant: what is not listed is refused, and refused before anything is asked of anybody.

use std::path::{Path, PathBuf};

use crate::job::DocumentUri;

/// A part of a store that may be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPrefix {
    /// Alias of the store.
    pub store: String,
    /// Bucket.
    pub bucket: String,
    /// Beginning of the keys; empty: all.
    pub prefix: String,
}

/// What may be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locations {
    /// Parts of object stores.
    pub objects: Vec<AllowedPrefix>,
    /// Folders, absolute.
    pub folders: Vec<PathBuf>,
}

impl Locations {
    /// Of (store, bucket, prefix) alone.
    pub fn of_buckets(allowed: &[(&str, &str, &str)]) -> Self {
        let prefix = |&(store, bucket, prefix): &(&str, &str, &str)| AllowedPrefix {
            store: store.to_owned(),
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        };
        Self { objects: allowed.iter().map(prefix).collect(), folders: Vec::new() }
    }

    /// Whether `uri` may be read, or why not.
    pub fn allows(&self, uri: &DocumentUri) -> Result<(), String> {
        let allowed = match uri {
            DocumentUri::S3 { store, bucket, key } => self.objects.iter().any(|allowed| {
                allowed.store == *store && allowed.bucket == *bucket && key.starts_with(&allowed.prefix)
            }),
            DocumentUri::File { path } => self.folders.iter().any(|folder| path.starts_with(folder)),
        };
        match allowed {
            true => Ok(()),
            false => Err(match uri {
                DocumentUri::S3 { .. } => "documents are not read from that store, bucket or prefix".to_owned(),
                DocumentUri::File { .. } => "documents are not read from that folder".to_owned(),
            }),
        }
    }

    /// As [`allows`](Self::allows), for a path with its links resolved: a link inside of a folder may point out of it.
    pub fn allows_resolved(&self, path: &Path) -> bool {
        self.folders.iter().filter_map(|folder| folder.canonicalize().ok()).any(|folder| path.starts_with(folder))
    }
}
