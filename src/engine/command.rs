//! What the ranks do next: decided by the root, obeyed by every rank in the same order.
//!
//! Invariant: the same commands leave every rank with the same sequences, each at the same place.

use serde::{Deserialize, Serialize};

use crate::plan::PrefillPlan;

/// Number of a sequence; a group never gives one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SequenceId(pub u64);

/// What all ranks work on together.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Tokens of the context; as many as the plan is for.
    pub context: &'a [u32],
    /// Tokens of the query.
    pub query: &'a [u32],
    /// How the context is cut.
    pub plan: &'a PrefillPlan,
    /// Generated tokens at most; what the last host's cache has room for.
    pub new_tokens: usize,
}

/// A [`Job`] that is no caller's any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnedJob {
    /// As in [`Job`].
    pub context: Vec<u32>,
    /// As in [`Job`].
    pub query: Vec<u32>,
    /// As in [`Job`].
    pub plan: PrefillPlan,
    /// As in [`Job`].
    pub new_tokens: usize,
}

impl From<&Job<'_>> for OwnedJob {
    fn from(job: &Job<'_>) -> Self {
        let Job { context, query, plan, new_tokens } = *job;
        Self { context: context.to_vec(), query: query.to_vec(), plan: plan.clone(), new_tokens }
    }
}

/// Tokens to append to a sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feed {
    /// The sequence, prefilled.
    pub sequence: SequenceId,
    /// At the positions after all its tokens so far.
    pub tokens: Vec<u32>,
}

/// One step of all ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Command {
    /// Make room for a sequence and embed its context.
    Begin { sequence: SequenceId, job: Box<OwnedJob> },
    /// Take the next layer of its prefill. After the last one there are the logits of its query, if that has gone through with it.
    Layer { sequence: SequenceId },
    /// Append tokens to sequences, all in one pass, and have the logits of the last of each if they are needed.
    Append { feeds: Vec<Feed>, gives_logits: bool },
    /// Forget a sequence.
    End { sequence: SequenceId },
}
