//! What drop folders remember in the store: which files were seen, since when they are unchanged, and what became of them.
//!
//! A file is *settling* until it has been the same for a while, then *taken* (it is a job) or *rejected* (it has a row that says why), and
//! *disposed* when its job has ended and the folder's policy was applied. Another version of it is settling again.
//!
//! Invariant: this is a memory, not the truth: any of it may be lost, and the next look with the inbox makes it again.

use std::time::Duration;

use async_trait::async_trait;

use super::{JobState, StoreError};
use crate::job::{Digest, JobId};

/// A file as a look found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropSighting {
    /// Digest of the document's URI; for a sidecar that of the document it belongs to.
    pub file: Digest,
    /// It says how its document is to be processed, and is none itself.
    pub is_sidecar: bool,
    /// Where it is; for people, if it has a `fault`.
    pub uri: String,
    /// What tells this version of it from others.
    pub version: String,
    /// Entity tag, of an object.
    pub etag: Option<String>,
    /// Bytes.
    pub size_bytes: u64,
    /// Why it cannot be a job, if that is known from its name already.
    pub fault: Option<String>,
}

/// A document of a drop folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropFile {
    /// Digest of its URI.
    pub file: Digest,
    /// Where it is.
    pub uri: String,
    /// What tells this version of it from others.
    pub version: String,
    /// Entity tag, of an object.
    pub etag: Option<String>,
    /// Bytes.
    pub size_bytes: u64,
    /// Why it cannot be a job.
    pub fault: Option<String>,
    /// URI of its sidecar, if one was seen.
    pub sidecar: Option<String>,
}

/// Which documents are ready to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyFiles {
    /// Unchanged for so long, they and their sidecars, by the database's clock and between two sightings.
    pub settle: Duration,
    /// Only documents whose sidecar was seen.
    pub with_sidecar: bool,
    /// The last one of the page before.
    pub after: Option<Digest>,
    /// Rows at most.
    pub limit: u32,
}

/// What became of a version of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropMark {
    /// Digest of its URI.
    pub file: Digest,
    /// The version that is meant; another one is not marked.
    pub version: String,
    /// Its new state.
    pub fate: DropFate,
}

/// The states after settling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DropFate {
    /// It is this job.
    Taken(JobId),
    /// It is none, and there is a row that says why.
    Rejected,
    /// Its job has ended (or it was rejected), and the policy was applied, or could not be, for this reason.
    Disposed(Option<String>),
}

impl DropFate {
    pub(super) fn state(&self) -> &'static str {
        match self {
            Self::Taken(_) => "taken",
            Self::Rejected => "rejected",
            Self::Disposed(_) => "disposed",
        }
    }

    pub(super) fn job(&self) -> Option<JobId> {
        match self {
            Self::Taken(job) => Some(*job),
            Self::Rejected | Self::Disposed(_) => None,
        }
    }

    pub(super) fn reason(&self) -> Option<&str> {
        match self {
            Self::Disposed(reason) => reason.as_deref(),
            Self::Taken(_) | Self::Rejected => None,
        }
    }
}

/// A document that nothing more happens to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedFile {
    /// The document.
    pub file: DropFile,
    /// How its job ended; absent if it was rejected.
    pub state: Option<JobState>,
}

/// The memory of drop folders; `place` names the folder.
#[async_trait]
pub trait DropStore: Send + Sync {
    /// Remembers what a look found. A file that is new, or another version of it, is settling from now on.
    async fn drop_seen(&self, place: &str, sightings: &[DropSighting]) -> Result<(), StoreError>;

    /// Settled documents that are neither taken nor rejected, ordered by their digest.
    async fn drop_ready(&self, place: &str, which: &ReadyFiles) -> Result<Vec<DropFile>, StoreError>;

    /// Writes down what became of them, all in one transaction.
    async fn drop_mark(&self, place: &str, marks: &[DropMark]) -> Result<(), StoreError>;

    /// Documents whose job has ended or that were rejected, and that are not disposed of, ordered by their digest.
    async fn drop_ended(&self, place: &str, after: Option<Digest>, limit: u32) -> Result<Vec<EndedFile>, StoreError>;

    /// Forgets what no look has found for `unseen`. Only after a look that came to its end.
    async fn drop_forget(&self, place: &str, unseen: Duration) -> Result<u64, StoreError>;
}
