//! What a row may see during prefill.
//!
//! [`blocks`] is full, star and APB attention: every host sees its passing block, the anchor and its local block; they differ
//! in what the plan puts there. [`selection`] chooses what is passed on. [`ring`] and [`ulysses`] are exact attention of several
//! ranks: over rotating blocks, and by head.
//!
//! Invariant: the plan alone decides what is seen; the number of ranks, the placement of hosts and what is overlapped change the order
//! of additions at most.

mod blocks;
mod ring;
mod selection;
mod ulysses;

use crate::backend::Backend;
use crate::comm::Comm;
use crate::plan::{AttentionMode, PrefillPlan, RankLayout};

use super::prefill::PrefillState;
use super::rank::{Rank, RankError};
use blocks::BlockAttention;
use ring::RingAttention;
use ulysses::UlyssesAttention;

/// The strategy of a plan, with its buffers; one value serves all layers.
pub(super) enum Attention<B: Backend> {
    /// Full, star, APB.
    Blocks(BlockAttention<B>),
    /// Ring.
    Ring(RingAttention<B>),
    /// Ulysses.
    Ulysses(UlyssesAttention<B>),
}

impl<B: Backend> Attention<B> {
    /// Buffers for a plan.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Self, RankError> {
        Ok(match plan.mode {
            AttentionMode::Full | AttentionMode::Star | AttentionMode::Apb => {
                Self::Blocks(BlockAttention::new(rank, plan, layout)?)
            }
            AttentionMode::Ring => Self::Ring(RingAttention::new(rank, plan, layout)?),
            AttentionMode::Ulysses => Self::Ulysses(UlyssesAttention::new(rank, plan, layout)?),
        })
    }

    /// Before RoPE is applied: the scores that are taken there.
    pub fn score_before_rope<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        state: &PrefillState<B>,
    ) -> Result<(), RankError> {
        match self {
            Self::Blocks(blocks) => blocks.score_before_rope(rank, layer, state),
            Self::Ring(_) | Self::Ulysses(_) => Ok(()),
        }
    }

    /// Attention of all rows of the rank.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &mut PrefillState<B>,
    ) -> Result<(), RankError> {
        match self {
            Self::Blocks(blocks) => blocks.attend(rank, plan, state),
            Self::Ring(ring) => ring.attend(rank, plan, state),
            Self::Ulysses(ulysses) => ulysses.attend(rank, state),
        }
    }
}
