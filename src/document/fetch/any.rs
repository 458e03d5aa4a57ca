//! All places that documents may be in, behind one source.
//!
//! Invariant: nothing is read that [`Locations`] does not allow, links resolved.

use async_trait::async_trait;

use super::{DocumentSource, FetchError, Fetched, FileSource, Locations, S3Source};
use crate::job::{DocumentRef, DocumentUri};

/// Object stores and folders, as far as they are allowed.
pub struct AllowedSource {
    locations: Locations,
    objects: S3Source,
    files: FileSource,
}

impl AllowedSource {
    /// Reads what `locations` allows.
    pub fn new(locations: Locations, objects: S3Source) -> Self {
        Self { locations, objects, files: FileSource }
    }
}

#[async_trait]
impl DocumentSource for AllowedSource {
    async fn fetch(&self, document: &DocumentRef, at_most: u64) -> Result<Fetched, FetchError> {
        let refused = || FetchError::NotAllowed { place: document.uri.to_string() };
        self.locations.allows(&document.uri).map_err(|_| refused())?;
        match &document.uri {
            DocumentUri::S3 { .. } => self.objects.fetch(document, at_most).await,
            DocumentUri::File { path } => {
                // A path that does not resolve is not there: the reader says so.
                let resolved = tokio::fs::canonicalize(path).await;
                if resolved.is_ok_and(|resolved| !self.locations.allows_resolved(&resolved)) {
                    return Err(refused());
                }
                self.files.fetch(document, at_most).await
            }
        }
    }
}
