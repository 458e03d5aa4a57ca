//! Ring attention: exact and causal; blocks of keys and values travel from rank to rank while partial results are merged.
//!
//! What travels is all that a rank has. Of what it holds, a rank's run of local blocks sees the rows of earlier hosts, which are the
//! first ones, since a rank's hosts ascend. With hosts that are paired every rank has about as much to do at every step.
//!
//! Invariant: after step `s` a rank holds the rows of the rank `s` places before it, and has seen of them what is earlier in the document.

use std::ops::Range;

use crate::backend::{AttentionTask, Backend, Mask, Segment};
use crate::comm::Comm;
use crate::engine::kv::KeyValues;
use crate::engine::prefill::PrefillState;
use crate::engine::rank::{Rank, RankError};
use crate::plan::{PrefillPlan, RankLayout, Run};

/// Buffers of the ring; without other ranks nothing travels.
pub struct RingAttention<B: Backend> {
    /// Rows of each rank.
    lengths: Vec<usize>,
    /// Over the rank's own rows.
    own: Vec<AttentionTask>,
    /// What of the rows of the rank `s + 1` places before is seen; as many as there are steps.
    others: Vec<Vec<AttentionTask>>,
    travelling: Option<Travelling<B>>,
}

struct Travelling<B: Backend> {
    /// The rows that have come last and are attended to; at the first step those are the rank's own.
    held: KeyValues<B::Matrix>,
    /// A copy of what is attended to, to be sent on, and where what comes goes; gone while they are on their way.
    ways: Option<[KeyValues<B::Matrix>; 2]>,
    part: B::Matrix,
    part_lse: B::Scores,
    lse: B::Scores,
}

impl<B: Backend> RingAttention<B> {
    /// Buffers for rows of the longest rank.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Self, RankError> {
        let (me, ranks, shape, backend) = (rank.comm.rank(), rank.comm.size(), rank.shape(), rank.backend);
        let layouts: Vec<RankLayout> = (0..ranks).map(|rank| plan.layout(rank, ranks)).collect();
        let longest = layouts.iter().map(|layout| layout.rows).max().unwrap_or(0);
        let rows = layout.rows.max(1);
        let travelling = match plan.active_ranks(ranks) {
            1 => None,
            _ => Some(Travelling {
                held: KeyValues::new(backend, shape, longest)?,
                ways: Some([KeyValues::new(backend, shape, longest)?, KeyValues::new(backend, shape, longest)?]),
                part: backend.matrix(rows, shape.q_width())?,
                part_lse: backend.scores(rows, shape.heads)?,
                lse: backend.scores(rows, shape.heads)?,
            }),
        };
        let steps = steps(&layouts);
        Ok(Self {
            lengths: layouts.iter().map(|layout| layout.rows).collect(),
            own: layout.runs().iter().map(|run| task(run, 0..run.rows.end, Mask::Causal)).collect(),
            others: (1..=steps).map(|step| tasks_over(layout, &layouts[(me + ranks - step) % ranks])).collect(),
            travelling,
        })
    }

    /// Attention of the rank's rows over the whole context before them.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &mut PrefillState<B>,
    ) -> Result<(), RankError> {
        let (backend, shape) = (rank.backend, rank.shape());
        let (activations, own_rows) = (&mut state.activations, &state.working);
        let (q, out) = (&activations.qkv, &mut activations.attended);
        let Some(Travelling { held, ways, part, part_lse, lse }) = &mut self.travelling else {
            if !self.own.is_empty() {
                backend.attention(shape, q, &[own_rows.view()], &self.own, out, None)?;
            }
            return Ok(());
        };
        let (me, ranks) = (rank.comm.rank(), rank.comm.size());
        for step in 0..=self.others.len() {
            let lengths = [step, step + 1].map(|back| self.lengths[(me + 2 * ranks - back) % ranks]);
            let is_last = step == self.others.len();
            let seen = if step == 0 { own_rows } else { &*held };
            let mut moving = None;
            if plan.execution.overlap && !is_last {
                moving = Some(send(rank, ways, seen, lengths)?);
            }
            if step == 0 {
                if !self.own.is_empty() {
                    backend.attention(shape, q, &[seen.view()], &self.own, out, Some(lse))?;
                }
            } else if !self.others[step - 1].is_empty() {
                let tasks = &self.others[step - 1];
                backend.attention(shape, q, &[seen.view()], tasks, part, Some(part_lse))?;
                for task in tasks {
                    let rows = task.queries.clone();
                    backend.merge(shape, rows.clone(), out, lse, part, part_lse, rows.start)?;
                }
            }
            if !plan.execution.overlap && !is_last {
                moving = Some(send(rank, ways, seen, lengths)?);
            }
            if let Some(moving) = moving {
                let (sent, arrived) = KeyValues::exchanged(&rank.comm, moving)?;
                *ways = Some([sent, std::mem::replace(held, arrived)]);
            }
        }
        Ok(())
    }
}

/// A run over rows of the one source.
fn task(run: &Run, rows: Range<usize>, mask: Mask) -> AttentionTask {
    AttentionTask { queries: run.rows.clone(), segments: vec![Segment { source: 0, rows, mask }] }
}

/// A rank's runs over what is earlier of another rank's rows.
fn tasks_over(layout: &RankLayout, held: &RankLayout) -> Vec<AttentionTask> {
    let over = |run: &Run| (run.clone(), held.rows_before(run.first_host));
    let seeing = layout.runs().iter().map(over).filter(|(_, seen)| !seen.is_empty()).collect::<Vec<_>>();
    seeing.into_iter().map(|(run, seen)| task(&run, seen, Mask::Full)).collect()
}

/// Steps until everybody has had all that it has to see.
fn steps(layouts: &[RankLayout]) -> usize {
    let ranks = layouts.len();
    let needed = |me: usize, step: usize| !tasks_over(&layouts[me], &layouts[(me + ranks - step) % ranks]).is_empty();
    (1..ranks).rev().find(|step| (0..ranks).any(|me| needed(me, *step))).unwrap_or(0)
}

/// Sends a copy of rows on, so that the rows themselves can be attended to meanwhile. `lengths`: what is sent, what comes.
fn send<B: Backend, C: Comm<B::Matrix, B::Scores>>(
    rank: &Rank<'_, B, C>,
    ways: &mut Option<[KeyValues<B::Matrix>; 2]>,
    rows: &KeyValues<B::Matrix>,
    [send_rows, receive_rows]: [usize; 2],
) -> Result<C::Exchange<2>, RankError> {
    let [mut copy, receive] = ways.take().expect("in place between steps");
    copy.copy_from(rank.backend, 0, rows, 0, send_rows)?;
    Ok(copy.rotate(&rank.comm, send_rows, receive, receive_rows)?)
}
