//! Bytes of a document from where they are: one trait, one implementation a kind of place.
//!
//! Invariant: what is returned are the bytes that were asked for, all of them, within the bound; anything else is an error.

mod any;
mod file;
mod locations;
mod s3;

use async_trait::async_trait;

use crate::job::{DocumentRef, ErrorCode};

pub use any::AllowedSource;
pub use file::{FileSource, entity_tag};
pub use locations::{AllowedPrefix, Locations};
pub use s3::S3Source;

/// A document's bytes and what their place says of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fetched {
    /// All of them.
    pub bytes: Vec<u8>,
    /// Version they have, where the place keeps versions.
    pub version_id: Option<String>,
    /// Entity tag they have.
    pub etag: Option<String>,
    /// Content type the place gives.
    pub content_type: Option<String>,
}

/// Why a document could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It is not there.
    #[error("{place}: there is no such document")]
    NotFound { place: String },
    /// It may not be read.
    #[error("{place}: no permission to read it")]
    Forbidden { place: String },
    /// It is no file: a folder, a device, a pipe.
    #[error("{place}: {found}, not a file")]
    NotAFile { place: String, found: &'static str },
    /// It is longer than allowed, or than what the job's other documents leave of that.
    #[error("{place}: more than {at_most} bytes, the most that may be read of it")]
    TooLarge { place: String, at_most: u64 },
    /// Its bytes are not those that the job named, or changed while they were read.
    #[error("{place}: the document has changed since the job was made")]
    Changed { place: String },
    /// This worker reads no documents from such a place.
    #[error("{place}: documents are not read from there")]
    NotAllowed { place: String },
    /// The place did not answer, or stopped in between.
    #[error("{place}: {reason}")]
    Unavailable { place: String, reason: String },
    /// The place took too long.
    #[error("{place}: not read within {seconds} seconds")]
    TimedOut { place: String, seconds: u64 },
    /// The place refuses this worker, or the worker's configuration of it is wrong.
    #[error("{place}: {reason}")]
    Refused { place: String, reason: String },
}

impl FetchError {
    /// What it means for the job.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotFound { .. } => ErrorCode::DocumentNotFound,
            Self::Forbidden { .. } => ErrorCode::DocumentForbidden,
            Self::NotAFile { .. } => ErrorCode::MediaTypeUnsupported,
            Self::TooLarge { .. } => ErrorCode::DocumentTooLarge,
            Self::Changed { .. } => ErrorCode::SourceChanged,
            Self::NotAllowed { .. } => ErrorCode::LocationNotAllowed,
            Self::Unavailable { .. } => ErrorCode::FetchFailed,
            Self::TimedOut { .. } => ErrorCode::FetchTimedOut,
            Self::Refused { .. } => ErrorCode::FetchRefused,
        }
    }
}

/// A kind of place that documents are in.
#[async_trait]
pub trait DocumentSource: Send + Sync {
    /// All bytes of the document, which are at most `at_most`. Pinned versions and entity tags of `document` hold: other bytes
    /// are [`FetchError::Changed`].
    async fn fetch(&self, document: &DocumentRef, at_most: u64) -> Result<Fetched, FetchError>;
}
