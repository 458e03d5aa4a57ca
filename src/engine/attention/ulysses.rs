//! Ulysses: exact and causal; each rank attends with some of the KV heads for all tokens of the context.
//!
//! An all-to-all brings it the queries, keys and values of its heads from all ranks, and another takes what attention gave back. Rows are by
//! head on their way: `[rank][head][row of the rank]`. Each KV head is attended with as a model of one KV head, so that the rows of a
//! rank are read where they came to lie.
//!
//! Invariant: a rank gets and gives rows by the same counts; one without heads takes part in the exchanges alone.

use std::ops::Range;

use crate::backend::{AttentionTask, Backend, BackendError, HeadShape, KvRef, Mask, Segment};
use crate::comm::Comm;
use crate::engine::prefill::PrefillState;
use crate::engine::rank::{Rank, RankError};
use crate::plan::{PrefillPlan, RankLayout};

/// Tasks, and buffers for the exchange; without other ranks nothing is exchanged.
pub struct UlyssesAttention<B: Backend> {
    tasks: Vec<AttentionTask>,
    exchange: Option<Exchange<B>>,
}

struct Exchange<B: Backend> {
    /// Rows that go to each rank, and those that come from each.
    leaving: Vec<usize>,
    coming: Vec<usize>,
    /// Queries, keys and values by head, and what attention gave for them.
    q: Pair<B::Matrix>,
    k: Pair<B::Matrix>,
    v: Pair<B::Matrix>,
    attended: Option<B::Matrix>,
}

/// Rows that leave and rows that come; elsewhere while they are on their way.
struct Pair<M>(Option<(M, M)>);

impl<B: Backend> UlyssesAttention<B> {
    /// Tasks and buffers for a plan.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(
        rank: &Rank<'_, B, C>,
        plan: &PrefillPlan,
        layout: &RankLayout,
    ) -> Result<Self, RankError> {
        let (me, ranks, shape) = (rank.comm.rank(), rank.comm.size(), rank.shape());
        if plan.active_ranks(ranks) == 1 {
            let causal = |rows: Range<usize>| Segment { source: 0, rows, mask: Mask::Causal };
            let of_run = |rows: Range<usize>| AttentionTask { segments: vec![causal(0..rows.end)], queries: rows };
            return Ok(Self { tasks: layout.runs().into_iter().map(|run| of_run(run.rows)).collect(), exchange: None });
        }
        let layouts: Vec<RankLayout> = (0..ranks).map(|rank| plan.layout(rank, ranks)).collect();
        let heads = |rank| plan.kv_heads_of(rank, ranks, shape.kv_heads).len();
        let exchange = Exchange::new(
            rank.backend,
            shape,
            (0..ranks).map(|rank| heads(rank) * layout.rows).collect(),
            layouts.iter().map(|layout| heads(me) * layout.rows).collect(),
        )?;
        Ok(Self { tasks: tasks_by_head(&layouts, heads(me)), exchange: Some(exchange) })
    }

    /// Attention of the rank's rows over the whole context before them.
    pub fn attend<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        state: &mut PrefillState<B>,
    ) -> Result<(), RankError> {
        let (backend, shape) = (rank.backend, rank.shape());
        let (activations, rows) = (&mut state.activations, state.layout.rows);
        let Some(exchange) = &mut self.exchange else {
            if !self.tasks.is_empty() {
                let (q, out) = (&activations.qkv, &mut activations.attended);
                backend.attention(shape, q, &[state.working.view()], &self.tasks, out, None)?;
            }
            return Ok(());
        };
        exchange.bring(rank, &activations.qkv, rows)?;
        exchange.attend(backend, shape, &self.tasks)?;
        exchange.take_back(rank, rows, &mut activations.attended)
    }
}

impl<B: Backend> Exchange<B> {
    fn new(backend: &B, shape: HeadShape, leaving: Vec<usize>, coming: Vec<usize>) -> Result<Self, BackendError> {
        // At least one row, because a device may not know empty matrices.
        let (sends, receives) = (leaving.iter().sum::<usize>().max(1), coming.iter().sum::<usize>().max(1));
        let (group, dim) = (shape.group() * shape.head_dim, shape.head_dim);
        let pair =
            |cols| Ok::<_, BackendError>(Pair(Some((backend.matrix(sends, cols)?, backend.matrix(receives, cols)?))));
        let (q, k, v) = (pair(group)?, pair(dim)?, pair(dim)?);
        Ok(Self { leaving, coming, q, k, v, attended: Some(backend.matrix(receives, group)?) })
    }

    /// Brings queries, keys and values to the ranks of their heads.
    fn bring<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        qkv: &B::Matrix,
        rows: usize,
    ) -> Result<(), RankError> {
        let shape = rank.shape();
        let stacked = |pair: &mut Pair<B::Matrix>, first_col| {
            let (mut send, receive) = pair.take();
            if rows > 0 {
                rank.backend.stack_columns(qkv, (0, first_col), rows, shape.kv_heads, &mut send, 0)?;
            }
            Ok::<_, RankError>((send, receive))
        };
        let (q, to_q) = stacked(&mut self.q, 0)?;
        let (k, to_k) = stacked(&mut self.k, shape.q_width())?;
        let (v, to_v) = stacked(&mut self.v, shape.q_width() + shape.kv_width())?;
        let exchange = rank.comm.all_to_all([q, k, v], &self.leaving, [to_q, to_k, to_v], &self.coming)?;
        let ([sent_q, sent_k, sent_v], [q, k, v]) = rank.comm.finish_all_to_all(exchange)?;
        (self.q.0, self.k.0, self.v.0) = (Some((sent_q, q)), Some((sent_k, k)), Some((sent_v, v)));
        Ok(())
    }

    fn attend(&mut self, backend: &B, shape: HeadShape, tasks: &[AttentionTask]) -> Result<(), RankError> {
        if tasks.is_empty() {
            return Ok(());
        }
        let of_head = HeadShape { heads: shape.group(), kv_heads: 1, head_dim: shape.head_dim };
        let source = KvRef { k: self.k.received(), v: self.v.received() };
        let out = self.attended.as_mut().expect("in place between exchanges");
        backend.attention(of_head, self.q.received(), &[source], tasks, out, None)?;
        Ok(())
    }

    /// Takes what attention gave back to the ranks of the tokens; it comes to where their queries were.
    fn take_back<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        rows: usize,
        attended: &mut B::Matrix,
    ) -> Result<(), RankError> {
        let (left, came) = self.q.take();
        let given = self.attended.take().expect("in place between exchanges");
        let back = rank.comm.all_to_all([given], &self.coming, [left], &self.leaving)?;
        let ([given], [returned]) = rank.comm.finish_all_to_all(back)?;
        self.attended = Some(given);
        if rows > 0 {
            rank.backend.unstack_columns(&returned, 0, rows, rank.shape().kv_heads, attended, 0)?;
        }
        self.q.0 = Some((returned, came));
        Ok(())
    }
}

impl<M> Pair<M> {
    fn take(&mut self) -> (M, M) {
        self.0.take().expect("in place between exchanges")
    }

    fn received(&self) -> &M {
        &self.0.as_ref().expect("in place between exchanges").1
    }
}

/// For each of `heads` KV heads and each run of each rank: its queries over all rows before them, and over itself.
fn tasks_by_head(layouts: &[RankLayout], heads: usize) -> Vec<AttentionTask> {
    let mut first_rows = vec![0];
    for layout in layouts {
        first_rows.push(first_rows[first_rows.len() - 1] + heads * layout.rows);
    }
    let moved = |rows: Range<usize>, rank: usize, head: usize| {
        let first = first_rows[rank] + head * layouts[rank].rows;
        first + rows.start..first + rows.end
    };
    let mut tasks = Vec::new();
    for head in 0..heads {
        for (rank, run) in
            layouts.iter().enumerate().flat_map(|(rank, of)| of.runs().into_iter().map(move |run| (rank, run)))
        {
            let before = |other: usize| moved(layouts[other].rows_before(run.first_host), other, head);
            let others = (0..layouts.len()).filter(|other| *other != rank).map(before).filter(|rows| !rows.is_empty());
            let mut segments: Vec<_> = others.map(|rows| Segment { source: 0, rows, mask: Mask::Full }).collect();
            segments.push(Segment { source: 0, rows: moved(0..run.rows.end, rank, head), mask: Mask::Causal });
            tasks.push(AttentionTask { queries: moved(run.rows, rank, head), segments });
        }
    }
    tasks
}
