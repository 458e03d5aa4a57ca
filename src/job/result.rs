//! What an attempt leaves behind: the result with its flags, the facts of each document, the time of each stage.
//!
//! Invariant: whatever makes a result less than the whole answer to the whole document is a flag here.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::digest::Digest;
use super::ids::TokenCount;
use crate::generate::StopReason;
use crate::plan::PrefillPlan;

/// A stage of an attempt, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// From the enqueueing (or the end of the last wait) to the claim.
    Queue,
    /// Bytes from their store.
    Fetch,
    /// Bytes to text.
    Decode,
    /// Text to tokens.
    Tokenize,
    /// Context through all layers.
    Prefill,
    /// Query and generated tokens.
    Generate,
    /// Validation of the output, and writing it.
    Record,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 7] =
        [Self::Queue, Self::Fetch, Self::Decode, Self::Tokenize, Self::Prefill, Self::Generate, Self::Record];

    /// Name in the database and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Fetch => "fetch",
            Self::Decode => "decode",
            Self::Tokenize => "tokenize",
            Self::Prefill => "prefill",
            Self::Generate => "generate",
            Self::Record => "record",
        }
    }

    /// The stage of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.as_str() == name)
    }
}

/// How long each stage took; `None` for one that was not reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimes([Option<Duration>; 7]);

impl StageTimes {
    /// Time spent in `stage`.
    pub fn get(&self, stage: Stage) -> Option<Duration> {
        self.0[stage as usize]
    }

    /// Adds to the time of `stage` (a document processed in parts comes through a stage several times).
    pub fn add(&mut self, stage: Stage, time: Duration) {
        let slot = &mut self.0[stage as usize];
        *slot = Some(slot.unwrap_or_default() + time);
    }

    /// All stages together.
    pub fn total(&self) -> Duration {
        self.0.iter().flatten().sum()
    }
}

/// What was done about a context longer than the model takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OverflowHandling {
    /// Nothing: it fitted.
    #[default]
    None,
    /// The middle was left out.
    TruncateMiddle,
    /// It was processed in parts.
    MapReduce,
}

impl OverflowHandling {
    /// Name in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::TruncateMiddle => "truncate_middle",
            Self::MapReduce => "map_reduce",
        }
    }
}

/// What a reader of the result has to know about it; each one is a column.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultFlags {
    /// The attention was approximate (star, APB with more than one host).
    pub approximate_attention: bool,
    /// Part of the input was not read.
    pub input_truncated: bool,
    /// What was done about a context that is too long.
    pub overflow: OverflowHandling,
    /// The output ended because `max_new_tokens` were reached.
    pub output_truncated: bool,
    /// The output does not follow the job's schema.
    pub schema_failed: bool,
    /// Control characters were removed from the job's text, a document or the output, or undecodable bytes of a document replaced.
    pub text_cleaned: bool,
}

/// What is known of one document of the job after an attempt.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentFacts {
    /// Bytes read.
    pub bytes: Option<u64>,
    /// Digest of these bytes.
    pub digest: Option<Digest>,
    /// Version the bytes had.
    pub version_id: Option<String>,
    /// Entity tag the bytes had.
    pub etag: Option<String>,
    /// Kind that was found.
    pub media_type: Option<String>,
    /// Character encoding that was found.
    pub encoding: Option<String>,
    /// Tokens of its text.
    pub tokens: Option<TokenCount>,
}

/// What a job produced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    /// The output, cleaned.
    pub text: String,
    /// The output as JSON, for `extract` (if it parses).
    pub extraction: Option<Value>,
    /// Tokens of context and query.
    pub tokens_in: TokenCount,
    /// Generated tokens.
    pub tokens_out: TokenCount,
    /// Why generation ended.
    pub stop: StopReason,
    /// Name of the model.
    pub model: String,
    /// Digest over config, weights and heads.
    pub model_digest: String,
    /// Name of the device or devices.
    pub device: String,
    /// How the context was cut into hosts (the last part's plan for `map_reduce`).
    pub plan: PrefillPlan,
    /// What a reader has to know.
    pub flags: ResultFlags,
}
