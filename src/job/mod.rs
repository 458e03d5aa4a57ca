//! The job: its wire form, the checked form, what came out of it, and what an error means for it. Pure.
//!
//! A message ([`wire::JobMessage`]) is checked once, at the edge, and becomes a [`Job`]; everything behind the edge holds
//! a `Job`. An attempt at it ends in a [`JobResult`] or a [`JobError`], and [`retry::RetryPolicy::verdict`] says what
//! becomes of the job then.
//!
//! Invariant: no I/O, no clock, no randomness that is not seeded by its arguments.

pub mod clean;
pub mod digest;
pub mod ids;
pub mod outcome;
pub mod result;
pub mod retry;
pub mod source;
pub mod task;
pub mod wire;

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::plan::AttentionRequest;

pub use digest::Digest;
pub use ids::{Attempt, JobId, Priority, TokenCount, WorkerId};
pub use outcome::{Disposition, ErrorClass, ErrorCode, JobError};
pub use result::{DocumentFacts, JobResult, OverflowHandling, ResultFlags, Stage, StageTimes};
pub use source::{DocumentRef, DocumentUri};
pub use task::{Overflow, Task, TemplateId};
pub use wire::{JobMessage, MessageError, MessageLimits};

/// A job that passed every check; made by [`JobMessage::check`] only.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Identity; a second job with this id is the same job or a conflict.
    pub id: JobId,
    /// What to do with the documents.
    pub task: Task,
    /// The documents in reading order; never empty. Several are one context.
    pub documents: Vec<DocumentRef>,
    /// What the user asks for, in words; always there for `ask`.
    pub instruction: Option<String>,
    /// Prompt template; the task's own if the message named none.
    pub template: TemplateId,
    /// JSON Schema of the output; always there for `extract`, never otherwise.
    pub schema: Option<Value>,
    /// Model of the pool; absent: the pool's default.
    pub model: Option<String>,
    /// Attention strategy; what is absent is chosen from the length.
    pub attention: AttentionRequest,
    /// Generated tokens at most.
    pub max_new_tokens: u32,
    /// 0: greedy.
    pub temperature: f32,
    /// Seed of the sampler.
    pub seed: u64,
    /// Greater is claimed sooner.
    pub priority: Priority,
    /// Not worth starting after this instant.
    pub deadline: Option<DateTime<Utc>>,
    /// What to do when the context is longer than the model takes.
    pub overflow: Overflow,
    /// The producer's own words, for reports.
    pub labels: BTreeMap<String, String>,
    /// Control characters were removed from the instruction or a label.
    pub text_cleaned: bool,
    /// The message this job was made from, with its id: what the store keeps.
    pub message: JobMessage,
    /// Digest over the message without its id: tells a repeated message from a conflicting one.
    pub payload_digest: Digest,
}
