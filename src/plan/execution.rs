//! How a plan is carried out: which rank runs which hosts, what hides behind what, in which type blocks travel.
//!
//! Invariant: placement and overlap change the order of additions at most; the type of the passing blocks changes the result,
//! and does so alike on any number of ranks.

use serde::{Deserialize, Serialize};

/// Which hosts share a rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Neighbours: each rank has a run of hosts.
    Contiguous,
    /// Dealt to and fro, the last host first: with 2R hosts on R ranks, rank r has hosts r and 2R-1-r. Later hosts see more,
    /// so that this evens out what the ranks have to do.
    #[default]
    Paired,
}

/// In which type compressed blocks go from rank to rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PassingType {
    /// As they are computed.
    #[default]
    Native,
    /// FP8 (e4m3), a scale for every row and KV head: about half the bytes of bf16, at some cost in exactness.
    Fp8,
}

/// Options of execution; the default is what a request without them gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Execution {
    /// Which hosts share a rank.
    pub placement: Placement,
    /// Whether what comes from other ranks is awaited while attention over a rank's own rows is computed, and merged in afterwards.
    pub overlap: bool,
    /// In which type compressed blocks travel.
    pub passing_type: PassingType,
    /// Whether the query goes through the layers together with the context, which saves a pass over the weights, and costs what its rows add to
    /// every product of the context. A query of more tokens than one pass takes goes after it in any case.
    pub query_with_context: bool,
}

impl Default for Execution {
    fn default() -> Self {
        let (placement, passing_type) = (Placement::default(), PassingType::default());
        Self { placement, overlap: true, passing_type, query_with_context: false }
    }
}

impl Execution {
    /// Whether these are the options of a request without any.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
