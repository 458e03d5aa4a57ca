//! What can go wrong between a caller and the database.
//!
//! Invariant: no message has a password in it: locations are printed by [`StoreUrl`](super::StoreUrl)'s `Display` only.

use std::path::PathBuf;

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The location is not one this program can open.
    #[error("{url}: {reason}")]
    Url { url: String, reason: String },
    /// The database does not answer, or the connection was lost. Worth a repetition.
    #[error("{place}: {operation}: the database is not available: {source}")]
    Unavailable { place: String, operation: &'static str, source: sqlx::Error },
    /// The file could not be opened or created.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// Another process works on this SQLite file.
    #[error("{}: another apbd{} is working on this database; wait for it to end, or choose another file with --db", path.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    InUse { path: PathBuf, holder: Option<u32> },
    /// The schema is absent, older or newer than this program.
    #[error("{place}: {reason}")]
    Schema { place: String, reason: String },
    /// The database refused a statement. A fault of this program, of the schema, or of the role's rights.
    #[error("{place}: {operation}: {source}")]
    Refused { place: String, operation: &'static str, source: sqlx::Error },
    /// A row does not hold what this program writes.
    #[error("{place}: {operation}: column {column} is unreadable: {reason}")]
    Corrupt { place: String, operation: &'static str, column: &'static str, reason: String },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody's doing.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}
