//! Full, star and APB attention: each host's local block sees its passing block, the anchor, and itself causally.
//!
//! With several ranks the passing blocks travel while the hosts attend to anchor and local block, and are merged in
//! afterwards by log-sum-exp. With one rank there is nothing to wait for, and one call does all; so it is where a plan asks for no overlap.
//!
//! Invariant: the anchor sees only itself; a probe (the query after a host's block) is seen by nobody else.

use std::ops::Range;

use super::selection::Selection;
use crate::backend::{AttentionTask, Backend, Mask, Segment};
use crate::comm::Comm;
use crate::engine::prefill::PrefillState;
use crate::engine::rank::{Rank, RankError};
use crate::plan::{PrefillPlan, RankLayout};

/// Index of the rank's own rows among the sources of attention.
const WORKING: usize = 0;
/// Index of the compressed blocks of all hosts among them.
const PASSING: usize = 1;

/// Buffers and tasks of the blocks of a rank; the tasks are those of every layer.
pub struct BlockAttention<B: Backend> {
    selection: Option<Selection<B>>,
    /// Over anchor and local blocks; over the passing blocks too if these are not awaited apart.
    tasks: Vec<AttentionTask>,
    late: Option<LatePassing<B>>,
}

/// The part over passing blocks that come while the rest is computed.
struct LatePassing<B: Backend> {
    tasks: Vec<AttentionTask>,
    lse: B::Scores,
    part: B::Matrix,
    part_lse: B::Scores,
}

impl<B: Backend> BlockAttention<B> {
    /// Buffers and tasks for a plan.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Self, RankError> {
        let selection = Selection::new(rank, plan, layout)?;
        let apart = selection.is_some() && rank.comm.size() > 1 && plan.execution.overlap;
        let passing = plan.compressed_rows(rank.comm.size());
        let late = match apart {
            true => Some(LatePassing::new(rank, plan, layout, &passing)?),
            false => None,
        };
        let passing = if apart { Vec::new() } else { passing };
        Ok(Self { selection, tasks: own_tasks(plan, layout, &passing), late })
    }

    /// Before RoPE is applied: the scores that are taken there.
    pub fn score_before_rope<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: usize,
        state: &PrefillState<B>,
    ) -> Result<(), RankError> {
        match &mut self.selection {
            Some(selection) => selection.score_before_rope(rank, layer, state),
            None => Ok(()),
        }
    }

    /// Attention of all rows of the rank.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        state: &mut PrefillState<B>,
    ) -> Result<(), RankError> {
        let (backend, shape) = (rank.backend, rank.shape());
        let Some(selection) = &mut self.selection else {
            if !self.tasks.is_empty() {
                let (activations, sources) = (&mut state.activations, [state.working.view()]);
                backend.attention(shape, &activations.qkv, &sources, &self.tasks, &mut activations.attended, None)?;
            }
            return Ok(());
        };
        let gathering = selection.start(rank, plan, state)?;
        let (activations, own) = (&mut state.activations, state.working.view());
        let (q, out) = (&activations.qkv, &mut activations.attended);
        let Some(late) = &mut self.late else {
            let passing = selection.finish(rank, gathering)?;
            backend.attention(shape, q, &[own, passing.view()], &self.tasks, out, None)?;
            return Ok(());
        };
        if !self.tasks.is_empty() {
            backend.attention(shape, q, &[own], &self.tasks, out, Some(&mut late.lse))?;
        }
        let passing = selection.finish(rank, gathering)?;
        if !late.tasks.is_empty() {
            let LatePassing { tasks, lse, part, part_lse } = late;
            backend.attention(shape, q, &[passing.view()], tasks, part, Some(part_lse))?;
            for task in tasks {
                let rows = task.queries.clone();
                backend.merge(shape, rows.clone(), out, lse, part, part_lse, rows.start)?;
            }
        }
        Ok(())
    }
}

impl<B: Backend> LatePassing<B> {
    fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
        passing: &[Range<usize>],
    ) -> Result<Self, RankError> {
        let (rows, shape) = (layout.rows.max(1), rank.shape());
        Ok(Self {
            tasks: passing_tasks(plan, layout, passing),
            lse: rank.backend.scores(rows, shape.heads)?,
            part: rank.backend.matrix(rows, shape.q_width())?,
            part_lse: rank.backend.scores(rows, shape.heads)?,
        })
    }
}

/// Tasks over the rank's own rows, and over passing blocks made of these compressed ones, unless they come later.
fn own_tasks(plan: &PrefillPlan, layout: &RankLayout, compressed: &[Range<usize>]) -> Vec<AttentionTask> {
    let own = |rows: &Range<usize>, mask| Segment { source: WORKING, rows: rows.clone(), mask };
    let mut tasks = Vec::new();
    let mut add = |queries: &Range<usize>, segments: Vec<Segment>| {
        if !queries.is_empty() {
            let segments = segments.into_iter().filter(|segment| !segment.rows.is_empty()).collect();
            tasks.push(AttentionTask { queries: queries.clone(), segments });
        }
    };
    add(&layout.anchor, vec![own(&layout.anchor, Mask::Causal)]);
    for (host, local, probe) in hosts(layout) {
        let anchor = if host > 0 { layout.anchor.clone() } else { 0..0 };
        let mut seen = match compressed {
            [] => Vec::new(),
            compressed => passing_segments(plan, host, compressed, PASSING),
        };
        seen.push(own(&anchor, Mask::Full));
        add(local, [seen.clone(), vec![own(local, Mask::Causal)]].concat());
        add(probe, [seen, vec![own(local, Mask::Full), own(probe, Mask::Causal)]].concat());
    }
    tasks
}

/// Tasks over the passing blocks alone.
fn passing_tasks(plan: &PrefillPlan, layout: &RankLayout, compressed: &[Range<usize>]) -> Vec<AttentionTask> {
    let mut tasks = Vec::new();
    for (host, local, probe) in hosts(layout) {
        let segments = passing_segments(plan, host, compressed, 0);
        for queries in [local, probe].into_iter().filter(|rows| !rows.is_empty() && !segments.is_empty()) {
            tasks.push(AttentionTask { queries: queries.clone(), segments: segments.clone() });
        }
    }
    tasks
}

/// A host's passing block.
fn passing_segments(plan: &PrefillPlan, host: usize, compressed: &[Range<usize>], source: usize) -> Vec<Segment> {
    let runs = plan.passing_runs(host, compressed).into_iter();
    runs.map(|rows| Segment { source, rows, mask: Mask::Full }).collect()
}

/// Each host of the rank with its local rows and its probe.
fn hosts(layout: &RankLayout) -> impl Iterator<Item = (usize, &Range<usize>, &Range<usize>)> {
    let rows = layout.locals.iter().zip(&layout.probes);
    layout.hosts.iter().zip(rows).map(|(host, (local, probe))| (*host, local, probe))
}
