//! How a context is cut into hosts: local blocks, anchor, passing blocks, and who runs what. Pure.
//!
//! Invariant: no I/O, no model, no device; a plan follows from the numbers alone, and every token of the context is in
//! exactly one local block.

mod execution;
mod layout;
mod memory;
pub mod route;
mod settings;
mod split;
#[cfg(test)]
mod tests;
mod work;

use std::ops::Range;

pub use execution::{Execution, PassingType, Placement};
pub use layout::{RankLayout, Run};
pub use memory::{Footprint, QUERY_CHUNK, pass_rows};
use serde::{Deserialize, Serialize};
pub use settings::hosts as hosts_for;

/// Attention strategy of a prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttentionMode {
    /// Exact causal attention on one host.
    Full,
    /// Exact causal attention; key/value blocks rotate between the ranks.
    Ring,
    /// Exact causal attention; each rank does some of the KV heads for all tokens, an all-to-all before and after.
    Ulysses,
    /// Approximate: anchor of the first context tokens, no passing blocks.
    Star,
    /// Approximate: anchor with the query in it, and compressed passing blocks.
    Apb,
}

impl AttentionMode {
    /// Whether the result equals that of full attention up to rounding, whatever the numbers of the plan.
    pub fn is_exact(self) -> bool {
        matches!(self, Self::Full | Self::Ring | Self::Ulysses)
    }
}

/// How the tokens of a compressed block are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Selector {
    /// The model's trained retaining heads.
    RetainingHead,
    /// Mean attention score of the query's tokens; needs no training.
    QueryAware,
    /// Scores drawn at random; an ablation.
    Random {
        /// Seed of the draw; the same for every number of ranks.
        seed: u64,
    },
    /// No passing blocks.
    None,
}

/// What a caller asks for; what is absent is chosen from the length (`auto`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionRequest {
    /// Strategy; absent: full under about 8K tokens, APB above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<AttentionMode>,
    /// Hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<usize>,
    /// Anchor length in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<usize>,
    /// Passing length: tokens of each compressed block, per KV head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passing: Option<usize>,
    /// Selector; absent: retaining heads if the model has them, else query-aware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    /// Whether the anchor holds the query (APB); absent: yes. An ablation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_in_anchor: Option<bool>,
    /// Tokens of the context whose keys and values are kept for the query and what is generated, per KV head, chosen by retaining heads;
    /// absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_budget: Option<usize>,
    /// How the plan is carried out.
    #[serde(default, skip_serializing_if = "Execution::is_default")]
    pub execution: Execution,
}

/// The anchor block: `context[..head] ++ query ++ context[head..head + tail]`, at positions `0..len`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Context tokens before the query: `query_at` (all `len` of them if the query is left out).
    pub head: usize,
    /// Whether the whole query follows the head.
    pub has_query: bool,
    /// Context tokens after the query.
    pub tail: usize,
    /// Tokens in all.
    pub len: usize,
}

/// One sequence-parallel part of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Tokens of the context, and their positions.
    pub local: Range<usize>,
    /// Local tokens at the start that are never selected (host 0: the anchor's length).
    pub excluded: usize,
    /// Rows of this host's compressed block: `min(passing, local.len() - excluded)`; 0 for the last host.
    pub compressed: usize,
    /// Rows of its local block, per KV head, that are kept for the query and what is generated; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<usize>,
}

impl Host {
    /// Rows that are kept.
    pub fn kept_rows(&self) -> usize {
        self.kept.unwrap_or(self.local.len())
    }
}

/// What a model and an engine can do, as far as a plan depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The model has trained retaining heads.
    pub has_retaining_heads: bool,
    /// Hosts at most in one plan.
    pub max_hosts: usize,
}

/// Why there is no plan for a request. All of these are mistakes in the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// There is nothing to prefill.
    #[error("the context has no tokens")]
    EmptyContext,
    /// There is nothing to generate from.
    #[error("the query has no tokens")]
    EmptyQuery,
    /// The tokens before the document are more than the context has.
    #[error("the query stands after {query_at} tokens of the context in the anchor, the context has {context}")]
    QueryAt { query_at: usize, context: usize },
    /// No host, or more than are allowed.
    #[error("{hosts} hosts were asked for; between 1 and {max_hosts} are possible")]
    Hosts { hosts: usize, max_hosts: usize },
    /// Trained heads were asked for and are not there.
    #[error("the model has no retaining heads; give it a file of them, or choose the query-aware selector")]
    NoRetainingHeads,
    /// Nothing would be kept.
    #[error("a budget of 0 keys and values leaves nothing to read from")]
    NoBudget,
    /// Positions are 32 bits wide.
    #[error("{tokens} tokens are more than any plan can hold")]
    TooLong { tokens: usize },
}

/// A context cut into hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillPlan {
    /// Strategy.
    pub mode: AttentionMode,
    /// Tokens of the context (n).
    pub context: usize,
    /// Tokens of the query (|q|).
    pub query: usize,
    /// The hosts, in the order of their blocks; none is empty.
    pub hosts: Vec<Host>,
    /// The anchor of every host after the first; absent for the exact strategies, and with one host.
    pub anchor: Option<Anchor>,
    /// How compressed blocks are chosen.
    pub selector: Selector,
    /// Whether the result equals full attention's up to rounding (also an APB plan with one host).
    pub exact: bool,
    /// How it is carried out.
    #[serde(default)]
    pub execution: Execution,
    /// What differs from what was asked, in words: fewer hosts, query left out of the anchor.
    pub notes: Vec<String>,
}

impl PrefillPlan {
    /// Query tokens that go through the layers together with the context: all or none.
    pub fn query_rows(&self) -> usize {
        if self.execution.query_with_context && self.query <= QUERY_CHUNK { self.query } else { 0 }
    }

    /// Whether keys and values are dropped after the prefill of a layer.
    pub fn evicts(&self) -> bool {
        self.hosts.iter().any(|host| host.kept.is_some())
    }

    /// Compressed rows of the hosts before `host`, in their order: its passing block. With `hosts.len()`, those of all.
    pub fn compressed_before(&self, host: usize) -> usize {
        self.hosts[..host].iter().map(|host| host.compressed).sum()
    }

    /// Compressed rows of all hosts.
    pub fn compressed(&self) -> usize {
        self.compressed_before(self.hosts.len())
    }

    /// Whether compressed blocks are quantised on their way.
    pub fn passes_in_fp8(&self) -> bool {
        self.execution.passing_type == PassingType::Fp8 && self.compressed() > 0
    }

    /// The anchor's tokens, in order; nothing without an anchor.
    pub fn anchor_tokens(&self, context: &[u32], query: &[u32]) -> Vec<u32> {
        let Some(anchor) = &self.anchor else { return Vec::new() };
        let query = if anchor.has_query { query } else { &[] };
        [&context[..anchor.head], query, &context[anchor.head..anchor.head + anchor.tail]].concat()
    }
}
