//! What an error means for the job that met it: a stable code, its class, and what follows from it.
//!
//! Invariant: code, class and disposition hang together in the one table below; nothing decides on the text of a message.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Who has to act on an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorClass {
    /// The producer: message or document cannot be processed.
    Input,
    /// Producer or operator: a limit, a permission, a deadline, a cancel.
    Policy,
    /// Whoever chose the model: it gave nothing usable.
    Model,
    /// The operator: device or engine process.
    Gpu,
    /// The operator: storage, network, database, a worker that went away.
    Infra,
    /// The authors of this program.
    Internal,
}

impl ErrorClass {
    /// Every class.
    pub const ALL: [Self; 6] = [Self::Input, Self::Policy, Self::Model, Self::Gpu, Self::Infra, Self::Internal];

    /// Name in the database and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Policy => "policy",
            Self::Model => "model",
            Self::Gpu => "gpu",
            Self::Infra => "infra",
            Self::Internal => "internal",
        }
    }
}

/// What becomes of the job; how long to wait and when to give up is the [retry policy](super::retry)'s part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Disposition {
    /// It would fail again in the same way: the job ends here.
    Fail,
    /// Worth another attempt after a while; the attempt counts.
    RetryAfter,
    /// Not the job's fault at all: back to the queue, the attempt does not count.
    Requeue,
    /// As `RetryAfter`, and the engine must be replaced before it serves anybody again.
    EngineFatal,
}

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $class:ident, $disposition:ident;)+) => {
        /// A stable, machine-readable reason.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub enum ErrorCode { $($(#[doc = $doc])+ $name,)+ }

        impl ErrorCode {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Name in messages, in the database and in metrics.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// Who has to act.
            pub fn class(self) -> ErrorClass {
                match self { $(Self::$name => ErrorClass::$class,)+ }
            }

            /// What becomes of the job.
            pub fn disposition(self) -> Disposition {
                match self { $(Self::$name => Disposition::$disposition,)+ }
            }
        }
    };
}

error_codes! {
    /// The message is not a valid job.
    MessageInvalid = "message_invalid", Input, Fail;
    /// The message is larger or deeper than is read at all.
    MessageTooLarge = "message_too_large", Input, Fail;
    /// Another job with this id and another payload was there first.
    PayloadConflict = "payload_conflict", Input, Fail;
    /// The document is not there.
    DocumentNotFound = "document_not_found", Input, Fail;
    /// The document may not be read.
    DocumentForbidden = "document_forbidden", Input, Fail;
    /// The document has no text.
    DocumentEmpty = "document_empty", Input, Fail;
    /// The document is binary, or text in no encoding that can be told.
    DocumentNotText = "document_not_text", Input, Fail;
    /// The document is of a kind that is not read.
    MediaTypeUnsupported = "media_type_unsupported", Input, Fail;
    /// The document breaks the rules of its own format.
    DocumentCorrupt = "document_corrupt", Input, Fail;
    /// The document opens with a password only.
    DocumentEncrypted = "document_encrypted", Input, Fail;
    /// The document, or what it unpacks to, has more bytes than allowed.
    DocumentTooLarge = "document_too_large", Input, Fail;
    /// The document's bytes are not those the job pinned, or changed while they were read.
    SourceChanged = "source_changed", Input, Fail;
    /// No such prompt template.
    TemplateUnknown = "template_unknown", Input, Fail;
    /// The schema cannot be decoded by.
    SchemaUnsupported = "schema_unsupported", Input, Fail;

    /// The context is longer than the model takes, and the job says to fail then.
    ContextTooLong = "context_too_long", Policy, Fail;
    /// The context does not fit into the memory of any engine.
    MemoryTooSmall = "memory_too_small", Policy, Fail;
    /// The pool has no such model.
    ModelUnknown = "model_unknown", Policy, Fail;
    /// The location is outside of what is allowed.
    LocationNotAllowed = "location_not_allowed", Policy, Fail;
    /// The reply target is outside of what is allowed.
    ReplyNotAllowed = "reply_not_allowed", Policy, Fail;
    /// The deadline passed before the job was done.
    DeadlineExceeded = "deadline_exceeded", Policy, Fail;
    /// Somebody cancelled the job.
    Cancelled = "cancelled", Policy, Fail;

    /// The model gave something unusable.
    ModelFailed = "model_failed", Model, Fail;

    /// The device or a rank failed; the engine's state is not to be trusted.
    DeviceFailed = "device_failed", Gpu, EngineFatal;
    /// The engine's process ended under the job.
    EngineCrashed = "engine_crashed", Gpu, EngineFatal;
    /// The engine made no progress within its budget.
    EngineHung = "engine_hung", Gpu, EngineFatal;
    /// The device had no memory left, though the plan fits it.
    DeviceOutOfMemory = "device_out_of_memory", Gpu, RetryAfter;
    /// No engine is ready.
    EngineUnavailable = "engine_unavailable", Gpu, Requeue;

    /// The document could not be read: network, server, disk.
    FetchFailed = "fetch_failed", Infra, RetryAfter;
    /// The document came too slowly.
    FetchTimedOut = "fetch_timed_out", Infra, RetryAfter;
    /// The store of the document refuses our credentials, or is not configured right.
    FetchRefused = "fetch_refused", Infra, RetryAfter;
    /// The result could not be written to its place outside the database.
    OutputFailed = "output_failed", Infra, RetryAfter;
    /// The database did not answer.
    StoreUnavailable = "store_unavailable", Infra, Requeue;
    /// The worker stops, and hands the job back.
    Shutdown = "shutdown", Infra, Requeue;
    /// Another worker has the job now; nothing may be written for it.
    LeaseLost = "lease_lost", Infra, Requeue;

    /// The worker was gone before the attempt ended: killed, or it lost its machine.
    WorkerDied = "worker_died", Internal, RetryAfter;
    /// A fault of this program.
    Internal = "internal", Internal, RetryAfter;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ErrorCode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == text)
            .ok_or_else(|| format!("'{text}' is not an error code"))
    }
}

impl TryFrom<String> for ErrorCode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ErrorCode> for String {
    fn from(code: ErrorCode) -> String {
        code.as_str().to_owned()
    }
}

/// Why an attempt at a job gave no result.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct JobError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what, where, what to do. No document text, no secrets.
    pub message: String,
    /// How long the failing service asked us to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<Duration>,
}

impl JobError {
    /// An error with a message for people; control characters are removed from it.
    pub fn new(code: ErrorCode, message: impl AsRef<str>) -> Self {
        Self { code, message: super::clean::clean(message.as_ref()).into_owned(), retry_after: None }
    }

    /// Who has to act.
    pub fn class(&self) -> ErrorClass {
        self.code.class()
    }

    /// What becomes of the job.
    pub fn disposition(&self) -> Disposition {
        self.code.disposition()
    }
}
