//! Attention over lists of segments, in blocks, with the softmax formed as the blocks go by: no matrix of all scores.
//!
//! A piece of work is a block of query rows, the query heads that share one KV head, and a range of the keys. A long range under few
//! queries (a decode step) is cut into several pieces, whose results are merged by their log-sum-exps.
//!
//! Invariant: the cut follows from the shapes, not from the number of threads, so results do not depend on it.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{View, Write, multiply};
use super::matrix::Matrix;
use super::vector;
use crate::backend::{AttentionTask, HeadShape, KvRef, Mask, Segment};

/// Query rows times heads of the group in a piece: its scores against a block of keys stay in the second-level cache.
const QUERIES_A_PIECE: usize = 128;
/// Keys scored at once.
const KEYS_A_BLOCK: usize = 512;
/// Keys of a piece when the queries are few.
const KEYS_A_SPLIT: usize = 2048;
/// Query rows times heads up to which keys are split.
const FEW_QUERIES: usize = 64;

/// What all pieces of a call share.
pub(super) struct Inputs<'a> {
    pub shape: HeadShape,
    pub q: &'a Matrix,
    pub sources: &'a [KvRef<'a, Matrix>],
    pub tasks: &'a [AttentionTask],
}

struct Piece {
    task: usize,
    kv_head: usize,
    /// Rows of `q`.
    queries: Range<usize>,
    /// Keys, counted over the task's segments as if they were concatenated.
    keys: Range<usize>,
}

/// Result of a piece, one row a query row and head: not yet divided by the sum of the weights.
struct Partial {
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// Computes every task into `out` and `lse`.
pub(super) fn attention(inputs: &Inputs<'_>, out: &mut Matrix, mut lse: Option<&mut Matrix>) {
    let pieces = pieces(inputs);
    let partials: Vec<Partial> = pieces.par_iter().map(|piece| partial(inputs, piece)).collect();
    let mut done = pieces.into_iter().zip(partials).peekable();
    while let Some((piece, mut whole)) = done.next() {
        while let Some((_, more)) = done.next_if(|(next, _)| next.keys.start > 0) {
            whole.merge(&more, inputs.shape.head_dim);
        }
        whole.write(inputs.shape, &piece, out, lse.as_deref_mut());
    }
}

/// All the work, in the order of tasks, query rows, heads and keys.
fn pieces(inputs: &Inputs<'_>) -> Vec<Piece> {
    let group = inputs.shape.group();
    let rows_a_piece = (QUERIES_A_PIECE / group).max(1);
    let mut pieces = Vec::new();
    for (i, task) in inputs.tasks.iter().enumerate() {
        let total: usize = task.segments.iter().map(|segment| segment.rows.len()).sum();
        let keys_a_piece = if task.queries.len() * group <= FEW_QUERIES { KEYS_A_SPLIT } else { total.max(1) };
        for first in task.queries.clone().step_by(rows_a_piece) {
            let queries = first..(first + rows_a_piece).min(task.queries.end);
            for kv_head in 0..inputs.shape.kv_heads {
                // A task without keys has one piece all the same: its rows are zeros.
                for key in (0..total.max(1)).step_by(keys_a_piece) {
                    let keys = key..(key + keys_a_piece).min(total);
                    pieces.push(Piece { task: i, kv_head, queries: queries.clone(), keys });
                }
            }
        }
    }
    pieces
}

fn partial(inputs: &Inputs<'_>, piece: &Piece) -> Partial {
    let (dim, group) = (inputs.shape.head_dim, inputs.shape.group());
    let task = &inputs.tasks[piece.task];
    let packed = pack_queries(inputs, piece);
    let rows = piece.queries.len() * group;
    let mut result = Partial { out: vec![0.0; rows * dim], max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows] };
    let mut scores = vec![0.0; rows * KEYS_A_BLOCK];
    let mut before = 0;
    for segment in &task.segments {
        let from = piece.keys.start.max(before) - before;
        let to = piece.keys.end.min(before + segment.rows.len()).max(before + from) - before;
        before += segment.rows.len();
        let visible = Visible::new(task, segment, piece);
        let to = to.min(visible.of_row(piece.queries.len() - 1));
        for key in (from..to).step_by(KEYS_A_BLOCK) {
            let block = Block { first: key, keys: (to - key).min(KEYS_A_BLOCK) };
            let k = keys(inputs, piece, inputs.sources[segment.source].k, segment, &block);
            let queries = View::rows(&packed, rows, dim, dim);
            multiply(queries, k.transposed(), &mut scores, block.keys, Write::Set);
            result.take_block(&mut scores, &block, &visible, group);
            let v = keys(inputs, piece, inputs.sources[segment.source].v, segment, &block);
            multiply(View::rows(&scores, rows, block.keys, block.keys), v, &mut result.out, dim, Write::Add);
        }
    }
    result
}

/// The piece's queries scaled by `1/sqrt(head_dim)`: row `i * group + g` is head `g` of query row `i`.
fn pack_queries(inputs: &Inputs<'_>, piece: &Piece) -> Vec<f32> {
    let (dim, group) = (inputs.shape.head_dim, inputs.shape.group());
    let columns = piece.kv_head * group * dim..(piece.kv_head + 1) * group * dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let mut packed = Vec::with_capacity(piece.queries.len() * group * dim);
    for row in piece.queries.clone() {
        packed.extend(inputs.q.row(row)[columns.clone()].iter().map(|value| value * scale));
    }
    packed
}

/// Keys of a segment, counted from its start.
struct Block {
    first: usize,
    keys: usize,
}

/// The block's rows of one KV head of a source.
fn keys<'a>(inputs: &Inputs<'_>, piece: &Piece, source: &'a Matrix, segment: &Segment, block: &Block) -> View<'a> {
    let (dim, width) = (inputs.shape.head_dim, source.cols());
    let first = (segment.rows.start + block.first) * width + piece.kv_head * dim;
    View::rows(&source.data()[first..], block.keys, dim, width)
}

/// How many rows of a segment the queries of a piece see.
struct Visible {
    mask: Mask,
    rows: usize,
    /// Queries of the task that stand before the piece, and all of them.
    earlier: usize,
    queries: usize,
}

impl Visible {
    fn new(task: &AttentionTask, segment: &Segment, piece: &Piece) -> Self {
        let earlier = piece.queries.start - task.queries.start;
        Self { mask: segment.mask, rows: segment.rows.len(), earlier, queries: task.queries.len() }
    }

    /// For query row `row` of the piece.
    fn of_row(&self, row: usize) -> usize {
        match self.mask {
            Mask::Full => self.rows,
            Mask::Causal => (self.rows + self.earlier + row + 1).saturating_sub(self.queries).min(self.rows),
        }
    }
}

impl Partial {
    /// Turns the scores of a block into weights, and scales what was summed before to the new maxima.
    fn take_block(&mut self, scores: &mut [f32], block: &Block, visible: &Visible, group: usize) {
        let dim = self.out.len() / self.max.len();
        for (i, row) in scores.chunks_exact_mut(block.keys).take(self.max.len()).enumerate() {
            let seen = visible.of_row(i / group).saturating_sub(block.first).min(block.keys);
            let (row, hidden) = row.split_at_mut(seen);
            hidden.fill(0.0);
            let max = self.max[i].max(vector::max(row));
            if max == f32::NEG_INFINITY {
                continue;
            }
            if max > self.max[i] {
                let factor = (self.max[i] - max).exp();
                self.sum[i] *= factor;
                vector::scale(&mut self.out[i * dim..][..dim], factor);
                self.max[i] = max;
            }
            self.sum[i] += vector::exp_shifted(row, max);
        }
    }

    /// Adds the result for other keys of the same queries.
    fn merge(&mut self, more: &Self, dim: usize) {
        for i in 0..self.max.len() {
            let max = self.max[i].max(more.max[i]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (own, other) = ((self.max[i] - max).exp(), (more.max[i] - max).exp());
            self.sum[i] = self.sum[i] * own + more.sum[i] * other;
            self.max[i] = max;
            let more = &more.out[i * dim..][..dim];
            for (value, &more) in self.out[i * dim..][..dim].iter_mut().zip(more) {
                *value = *value * own + more * other;
            }
        }
    }

    /// Divides by the sums and puts the rows where they belong. A query that saw nothing gives zeros and -inf.
    fn write(&self, shape: HeadShape, piece: &Piece, out: &mut Matrix, mut lse: Option<&mut Matrix>) {
        let (dim, group) = (shape.head_dim, shape.group());
        for (i, row) in piece.queries.clone().enumerate() {
            for g in 0..group {
                let (from, head) = (i * group + g, piece.kv_head * group + g);
                let sum = self.sum[from];
                let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
                let to = &mut out.rows_in_mut(row..row + 1)[head * dim..][..dim];
                to.iter_mut().zip(&self.out[from * dim..][..dim]).for_each(|(to, &value)| *to = value * factor);
                if let Some(lse) = lse.as_deref_mut() {
                    lse.rows_in_mut(row..row + 1)[head] =
                        if sum > 0.0 { self.max[from] + sum.ln() } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

/// Merges partial results into `out` and `lse`, row by row; see [`crate::backend::Backend::merge`].
pub(super) fn merge(
    shape: HeadShape,
    rows: Range<usize>,
    into: (&mut Matrix, &mut Matrix),
    part: (&Matrix, &Matrix),
    part_first_row: usize,
) {
    let (dim, (out, lse)) = (shape.head_dim, into);
    for (i, row) in rows.enumerate() {
        let (from, from_lse) = (part.0.row(part_first_row + i), part.1.row(part_first_row + i));
        let (to, to_lse) = (out.rows_in_mut(row..row + 1), lse.rows_in_mut(row..row + 1));
        for head in 0..shape.heads {
            let (a, b) = (to_lse[head], from_lse[head]);
            let max = a.max(b);
            let columns = head * dim..(head + 1) * dim;
            if max == f32::NEG_INFINITY {
                to[columns].fill(0.0);
                continue;
            }
            let (own, other) = ((a - max).exp(), (b - max).exp());
            let sum = own + other;
            for (value, &more) in to[columns.clone()].iter_mut().zip(&from[columns]) {
                // A part that saw nothing may hold anything.
                let kept = if own > 0.0 { *value * own } else { 0.0 };
                let added = if other > 0.0 { more * other } else { 0.0 };
                *value = (kept + added) / sum;
            }
            to_lse[head] = max + sum.ln();
        }
    }
}
