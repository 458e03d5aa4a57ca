//! Names of attention strategies and selectors on the command line of those who compare them.
//!
//! Invariant: a name stands for the same thing in every subcommand.

use clap::ValueEnum;

use crate::plan::{AttentionMode, Selector};

/// Values of `--attention`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AttentionName {
    /// By the length of the context.
    Auto,
    /// Exact, on one host.
    Full,
    /// Exact, blocks of keys and values going round.
    Ring,
    /// Exact, each rank with some of the heads.
    Ulysses,
    /// Approximate: anchor and own block.
    Star,
    /// Approximate: anchor with the query, passing blocks, own block.
    Apb,
}

impl AttentionName {
    /// As a plan is asked for; `None` leaves it to the length.
    pub fn mode(self) -> Option<AttentionMode> {
        match self {
            Self::Auto => None,
            Self::Full => Some(AttentionMode::Full),
            Self::Ring => Some(AttentionMode::Ring),
            Self::Ulysses => Some(AttentionMode::Ulysses),
            Self::Star => Some(AttentionMode::Star),
            Self::Apb => Some(AttentionMode::Apb),
        }
    }
}

/// Values of `--selector`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SelectorName {
    /// The model's trained heads.
    RetainingHead,
    /// The question's own attention.
    QueryAware,
    /// At random.
    Random,
    /// Nothing is passed.
    None,
}

impl SelectorName {
    /// As a plan is asked for.
    pub fn selector(self, seed: u64) -> Selector {
        match self {
            Self::RetainingHead => Selector::RetainingHead,
            Self::QueryAware => Selector::QueryAware,
            Self::Random => Selector::Random { seed },
            Self::None => Selector::None,
        }
    }
}
