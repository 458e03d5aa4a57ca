//! What can go wrong between this process and an object store.
//!
//! Invariant: the class of an error follows from the status of the answer, never from its text.

use std::time::Duration;

/// Why a request did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// There is no such object, version or bucket.
    #[error("{place}: there is no such object")]
    NotFound { place: String },
    /// The object is not the one that was named (If-Match).
    #[error("{place}: the object has changed")]
    Changed { place: String },
    /// The server knows who asks, and does not allow it.
    #[error("{place}: not allowed by the server ({code})")]
    Forbidden { place: String, code: String },
    /// The server does not accept the credentials, or there are none.
    #[error("{place}: the server refuses the credentials: {reason}")]
    Credentials { place: String, reason: String },
    /// The server refuses the request.
    #[error("{place}: the server answers {status} ({code})")]
    Refused { place: String, status: u16, code: String },
    /// The server is not reached, breaks off or is busy. Worth another try.
    #[error("{place}: {reason}")]
    Unavailable { place: String, reason: String },
    /// Nothing came for too long. Worth another try.
    #[error("{place}: nothing came for {} s", bound.as_secs_f32())]
    TimedOut { place: String, bound: Duration },
    /// The server's answer is not what the protocol says.
    #[error("{place}: the answer is unreadable: {reason}")]
    Unreadable { place: String, reason: String },
}

impl ObjectError {
    /// Whether the same request may succeed later without anybody's doing.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::TimedOut { .. })
    }

    /// That of an answer with an error status; `code` is the word of the server's error document.
    pub(super) fn of_status(place: String, status: u16, code: String) -> Self {
        match (status, code.as_str()) {
            (404, _) | (400, "InvalidVersionId" | "NoSuchVersion") => Self::NotFound { place },
            (412, _) => Self::Changed { place },
            (401, _)
            | (403, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidClientTokenId" | "ExpiredToken")
            | (400, "ExpiredToken" | "InvalidToken") => Self::Credentials { place, reason: code },
            (403, _) => Self::Forbidden { place, code },
            (408 | 425 | 429 | 500..=599, _) => {
                Self::Unavailable { place, reason: format!("the server answers {status} ({code})") }
            }
            _ => Self::Refused { place, status, code },
        }
    }
}
