//! Ring attention: exact and causal; blocks of keys and values travel from rank to rank while partial results are merged.
//!
//! Invariant: after step `s` a rank holds the block of the rank `s` places before it, and has seen it if it is earlier in the
//! document.

use crate::backend::{AttentionTask, Backend, KvRef, Mask, Segment};
use crate::comm::Comm;
use crate::engine::kv::{KeyValues, Moving};
use crate::engine::prefill::PrefillState;
use crate::engine::rank::{Rank, RankError};
use crate::plan::{PrefillPlan, RankLayout};

/// Buffers of the ring; absent with one rank, which has all blocks.
pub struct RingAttention<B: Backend> {
    /// Context tokens of each rank.
    lengths: Vec<usize>,
    travelling: Option<Travelling<B>>,
}

struct Travelling<B: Backend> {
    /// The block that is attended to, and the copy of it that is on its way.
    held: KeyValues<B::Matrix>,
    sent: Option<KeyValues<B::Matrix>>,
    part: B::Matrix,
    part_lse: B::Scores,
    lse: B::Scores,
}

impl<B: Backend> RingAttention<B> {
    /// Buffers for blocks of the longest rank.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Self, RankError> {
        let (ranks, shape, backend) = (rank.comm.size(), rank.shape(), rank.backend);
        let lengths: Vec<usize> = (0..ranks).map(|rank| plan.layout(rank, ranks).rows).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rows = layout.rows.max(1);
        let travelling = match plan.active_ranks(ranks) {
            1 => None,
            _ => Some(Travelling {
                held: KeyValues::new(backend, shape, longest)?,
                sent: Some(KeyValues::new(backend, shape, longest)?),
                part: backend.matrix(rows, shape.q_width())?,
                part_lse: backend.scores(rows, shape.heads)?,
                lse: backend.scores(rows, shape.heads)?,
            }),
        };
        Ok(Self { lengths, travelling })
    }

    /// Attention of the rank's rows over the whole context before them.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &mut PrefillState<B>,
    ) -> Result<(), RankError> {
        let (me, ranks, rows) = (rank.comm.rank(), rank.comm.size(), state.layout.rows);
        let activations = &mut state.activations;
        let own = Attend { rank, q: &activations.qkv, rows };
        let Some(Travelling { held, sent, part, part_lse, lse }) = &mut self.travelling else {
            return own.over(state.working.view(), rows, Mask::Causal, &mut activations.attended, None);
        };
        // Blocks reach every rank that needs them after as many steps as there are others before it.
        let steps = plan.active_ranks(ranks) - 1;
        held.copy_from(rank.backend, 0, &state.working, 0, rows)?;
        for step in 0..=steps {
            let holds = (me + ranks - step) % ranks;
            let comes = (me + ranks - step - 1) % ranks;
            let moving = match step < steps {
                true => Some(send(rank, sent, held, self.lengths[holds], self.lengths[comes])?),
                false => None,
            };
            if step == 0 {
                own.over(held.view(), rows, Mask::Causal, &mut activations.attended, Some(lse))?;
            } else if holds < me && rows > 0 {
                own.over(held.view(), self.lengths[holds], Mask::Full, part, Some(part_lse))?;
                rank.backend.merge(rank.shape(), 0..rows, &mut activations.attended, lse, part, part_lse, 0)?;
            }
            if let Some(moving) = moving {
                let arrived = KeyValues::arrived(&rank.comm, moving)?;
                *sent = Some(std::mem::replace(held, arrived));
            }
        }
        Ok(())
    }
}

/// Sends a copy of the held block on, so that the block itself can be attended to meanwhile.
fn send<B: Backend, C: Comm<B::Matrix, B::Scores>>(
    rank: &Rank<'_, B, C>,
    buffer: &mut Option<KeyValues<B::Matrix>>,
    held: &KeyValues<B::Matrix>,
    send_rows: usize,
    receive_rows: usize,
) -> Result<Moving<C::Pending>, RankError> {
    let mut copy = buffer.take().expect("in place between steps");
    copy.copy_from(rank.backend, 0, held, 0, send_rows)?;
    Ok(copy.rotate(&rank.comm, send_rows, receive_rows)?)
}

/// All rows of a rank over one block.
struct Attend<'a, B: Backend, C> {
    rank: &'a Rank<'a, B, C>,
    q: &'a B::Matrix,
    rows: usize,
}

impl<B: Backend, C: Comm<B::Matrix, B::Scores>> Attend<'_, B, C> {
    fn over(
        &self,
        source: KvRef<'_, B::Matrix>,
        length: usize,
        mask: Mask,
        out: &mut B::Matrix,
        lse: Option<&mut B::Scores>,
    ) -> Result<(), RankError> {
        if self.rows == 0 {
            return Ok(());
        }
        let segments = vec![Segment { source: 0, rows: 0..length, mask }];
        let task = AttentionTask { queries: 0..self.rows, segments };
        self.rank.backend.attention(self.rank.shape(), self.q, &[source], &[task], out, lse)?;
        Ok(())
    }
}
