//! Softmax attention in tiles: blocks of query rows against blocks of keys, with the softmax kept up as keys come in.
//!
//! The query heads that share a KV head are packed into one tile, so that keys and values are read once for all of them.
//! Long inputs are spread over threads by blocks of queries; where those are few (a query, a token being generated), the
//! keys are split as well and the parts merged.
//!
//! Invariant: how the work is cut depends on the shapes alone, so that results do not depend on the number of threads.

mod keys;
mod merge;
mod softmax;
mod tile;

pub(super) use merge::merge;

use super::linear::check_rows;
use super::matrix::{Matrix, Scores};
use super::threads::Threads;
use super::view::ViewMut;
use super::{check, check_shape};
use crate::{AttentionTask, BackendError, HeadShape, KvRef, Mask};
use keys::{KeyBlock, key_blocks};
use tile::{Partial, Tile};

/// Rows (queries times the heads of a group) of a tile.
const TILE_ROWS: usize = 128;
/// With this many query blocks, those alone keep all threads busy.
const ENOUGH_BLOCKS: usize = 32;
/// Pieces of work to cut a call into that has fewer query blocks.
const PIECES: usize = 64;
/// Key blocks worth a piece of work of their own.
const PART_KEY_BLOCKS: usize = 4;

/// What all tiles of a call read.
struct Inputs<'a> {
    shape: HeadShape,
    q: &'a Matrix,
    sources: &'a [KvRef<'a, Matrix>],
}

/// A run of a task's queries, with where their results go.
struct QueryBlock<'a> {
    task: &'a AttentionTask,
    /// Counted from the task's first query.
    first: usize,
    out: ViewMut<'a>,
    lse: Option<ViewMut<'a>>,
}

impl QueryBlock<'_> {
    fn keys(&self) -> Vec<KeyBlock> {
        key_blocks(self.task, self.first, self.out.rows)
    }

    fn tile<'a>(&self, inputs: &Inputs<'a>, kv_head: usize) -> Tile<'a> {
        Tile {
            inputs: Inputs { ..*inputs },
            kv_head,
            first_row: self.task.queries.start + self.first,
            queries: self.out.rows,
        }
    }
}

/// See [`crate::Backend::attention`].
pub(super) fn attention(
    threads: &Threads,
    shape: HeadShape,
    q: &Matrix,
    sources: &[KvRef<'_, Matrix>],
    tasks: &[AttentionTask],
    out: &mut Matrix,
    lse: Option<&mut Scores>,
) -> Result<(), BackendError> {
    let inputs = Inputs { shape, q, sources };
    check_inputs(&inputs, tasks, out, lse.as_deref())?;
    let blocks = query_blocks(shape, tasks, out, lse)?;
    if blocks.len() >= ENOUGH_BLOCKS {
        whole_blocks(threads, &inputs, blocks);
    } else {
        split_blocks(threads, &inputs, blocks);
    }
    Ok(())
}

/// One query block as a piece of work.
fn whole_blocks(threads: &Threads, inputs: &Inputs<'_>, mut blocks: Vec<QueryBlock<'_>>) {
    // The longest first, so that none is begun when the others are about to end.
    blocks.sort_by_cached_key(|block| {
        std::cmp::Reverse(block.out.rows * block.keys().iter().map(KeyBlock::len).sum::<usize>())
    });
    threads.each_with(blocks, Vec::new, |scratch, mut block| {
        let keys = block.keys();
        for kv_head in 0..inputs.shape.kv_heads {
            let partial = block.tile(inputs, kv_head).attend(&keys, scratch);
            partial.store(inputs.shape, kv_head, &mut block);
        }
    });
}

/// One part of the keys of one KV head of one query block as a piece of work; then the parts are merged.
fn split_blocks(threads: &Threads, inputs: &Inputs<'_>, mut blocks: Vec<QueryBlock<'_>>) {
    let kv_heads = inputs.shape.kv_heads;
    let wanted = PIECES.div_ceil((blocks.len() * kv_heads).max(1));
    let keys: Vec<_> = blocks.iter().map(QueryBlock::keys).collect();
    let mut pieces = Vec::new();
    for (index, keys) in keys.iter().enumerate() {
        let parts = keys.len().div_ceil(PART_KEY_BLOCKS).clamp(1, wanted);
        let length = keys.len().div_ceil(parts).max(1);
        // A block that sees no key has one part all the same, which says so.
        for first in (0..keys.len().max(1)).step_by(length) {
            let range = first..(first + length).min(keys.len());
            // The heads of a range one after the other: their keys lie side by side in memory.
            pieces.extend((0..kv_heads).map(|kv_head| (index, kv_head, range.clone())));
        }
    }
    let mut partials: Vec<Option<Partial>> = pieces.iter().map(|_| None).collect();
    let work = pieces.iter().zip(&mut partials).collect();
    threads.each_with(work, Vec::new, |scratch, ((index, kv_head, range), partial)| {
        let tile = blocks[*index].tile(inputs, *kv_head);
        *partial = Some(tile.attend(&keys[*index][range.clone()], scratch));
    });
    let mut whole: Vec<Option<Partial>> = (0..blocks.len() * kv_heads).map(|_| None).collect();
    for ((index, kv_head, _), partial) in pieces.into_iter().zip(partials.into_iter().flatten()) {
        match &mut whole[index * kv_heads + kv_head] {
            Some(sum) => sum.absorb(&partial),
            none => *none = Some(partial),
        }
    }
    for (place, sum) in whole.into_iter().enumerate() {
        let (index, kv_head) = (place / kv_heads, place % kv_heads);
        sum.into_iter().for_each(|sum| sum.store(inputs.shape, kv_head, &mut blocks[index]));
    }
}

/// Cuts the tasks' queries, and the rows of the results with them.
fn query_blocks<'a>(
    shape: HeadShape,
    tasks: &'a [AttentionTask],
    out: &'a mut Matrix,
    lse: Option<&'a mut Scores>,
) -> Result<Vec<QueryBlock<'a>>, BackendError> {
    let mut tasks: Vec<&AttentionTask> = tasks.iter().filter(|task| !task.queries.is_empty()).collect();
    tasks.sort_by_key(|task| task.queries.start);
    let queries = (TILE_ROWS / shape.group()).max(1);
    let (mut blocks, mut row) = (Vec::new(), 0);
    let rows = last_row(tasks.iter().copied());
    let mut rest = (ViewMut::of(out, rows), lse.map(|lse| ViewMut::of(lse, rows)));
    for task in tasks {
        check("attention", task.queries.start >= row, || {
            (format!("rows of one task each, from {row} on"), format!("{:?}", task.queries))
        })?;
        rest = split(rest, task.queries.start - row).1;
        for first in (0..task.queries.len()).step_by(queries) {
            let count = queries.min(task.queries.len() - first);
            let ((out, lse), others) = split(rest, count);
            blocks.push(QueryBlock { task, first, out, lse });
            rest = others;
        }
        row = task.queries.end;
    }
    Ok(blocks)
}

/// Where the queries of the last task end.
fn last_row<'a>(tasks: impl IntoIterator<Item = &'a AttentionTask>) -> usize {
    tasks.into_iter().map(|task| task.queries.end).max().unwrap_or(0)
}

type Results<'a> = (ViewMut<'a>, Option<ViewMut<'a>>);

fn split<'a>((out, lse): Results<'a>, row: usize) -> (Results<'a>, Results<'a>) {
    let (above, below) = out.split_rows(row);
    let (lse_above, lse_below) = lse.map(|lse| lse.split_rows(row)).unzip();
    ((above, lse_above), (below, lse_below))
}

fn check_inputs(
    inputs: &Inputs<'_>,
    tasks: &[AttentionTask],
    out: &Matrix,
    lse: Option<&Scores>,
) -> Result<(), BackendError> {
    let (op, shape) = ("attention", inputs.shape);
    check_shape(op, shape)?;
    let rows = last_row(tasks);
    check_rows(op, "out", rows, shape.q_width(), out)?;
    check(op, inputs.q.rows() >= rows && inputs.q.cols() >= shape.q_width(), || {
        let got = format!("[{}, {}]", inputs.q.rows(), inputs.q.cols());
        (format!("q of at least {rows} rows, {} columns", shape.q_width()), got)
    })?;
    if let Some(lse) = lse {
        check_rows(op, "lse", rows, shape.heads, lse)?;
    }
    for segment in tasks.iter().flat_map(|task| &task.segments) {
        let source = inputs.sources.get(segment.source);
        check(op, source.is_some(), || {
            (format!("a source below {}", inputs.sources.len()), format!("{}", segment.source))
        })?;
        for matrix in source.iter().flat_map(|source| [source.k, source.v]) {
            check_rows(op, "a source", segment.rows.end, shape.kv_width(), matrix)?;
        }
    }
    Ok(())
}

/// How many of `keys` rows query `i` of `queries` sees; negative if it ends before the first.
fn visible(mask: Mask, queries: usize, keys: usize, i: usize) -> isize {
    match mask {
        Mask::Full => keys as isize,
        Mask::Causal => keys as isize - queries as isize + i as isize + 1,
    }
}
