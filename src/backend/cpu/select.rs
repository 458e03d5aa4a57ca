//! Choosing rows by their scores, and copying what was chosen.
//!
//! Invariant: the choice is a function of the scores alone: of equal scores the lowest column wins.

use std::ops::Range;

use super::linear::check_rows;
use super::matrix::{Matrix, Rows, Scores};
use super::threads::Threads;
use super::{check, check_shape};
use crate::{BackendError, HeadShape, KvMut, KvRef};

/// Columns to either side that a pooled score is the maximum of.
const POOL_REACH: usize = 2;

/// See [`crate::Backend::top_k`].
pub(super) fn top_k(
    threads: &Threads,
    scores: &Scores,
    before: Range<usize>,
    candidates: Range<usize>,
    excluded: usize,
    k: usize,
    pool: bool,
) -> Result<Rows, BackendError> {
    check("top_k", before.end.max(candidates.end) <= scores.cols(), || {
        (format!("columns below {}", scores.cols()), format!("{before:?} and {candidates:?}"))
    })?;
    let eligible = candidates.len().saturating_sub(excluded);
    check("top_k", k <= eligible, || (format!("at most {eligible} to choose"), format!("{k}")))?;
    let mut chosen = vec![Vec::new(); scores.rows()];
    let heads = chosen.iter_mut().enumerate().collect();
    threads.each(heads, |(head, chosen): (usize, &mut Vec<u32>)| {
        let scores = scores.row(head);
        let sequence: Vec<f32> = scores[before.clone()].iter().chain(&scores[candidates.clone()]).copied().collect();
        let sequence = if pool { max_pool(&sequence) } else { sequence };
        let first = candidates.start + excluded;
        *chosen = best(&sequence[before.len() + excluded.min(candidates.len())..], k, first);
    });
    Ok(Rows::new(chosen))
}

/// The maximum of each element and its neighbours.
fn max_pool(x: &[f32]) -> Vec<f32> {
    let window = |i: usize| &x[i.saturating_sub(POOL_REACH)..(i + POOL_REACH + 1).min(x.len())];
    (0..x.len()).map(|i| window(i).iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect()
}

/// The places of the `k` largest, ascending, counted from `first`.
fn best(scores: &[f32], k: usize, first: usize) -> Vec<u32> {
    // Adding 0 makes -0 equal to 0; a NaN is the last that anybody would choose.
    let rank = |i: u32| match scores[i as usize] {
        score if score.is_nan() => f32::NEG_INFINITY,
        score => score + 0.0,
    };
    let mut places: Vec<u32> = (0..scores.len() as u32).collect();
    if k > 0 && k < places.len() {
        places.select_nth_unstable_by(k - 1, |&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
    }
    places.truncate(k);
    places.sort_unstable();
    places.iter_mut().for_each(|place| *place += first as u32);
    places
}

/// See [`crate::Backend::gather_kv`].
pub(super) fn gather_kv(
    shape: HeadShape,
    chosen: &Rows,
    source_offset: usize,
    src: KvRef<'_, Matrix>,
    dst: KvMut<'_, Matrix>,
) -> Result<(), BackendError> {
    let (op, heads) = ("gather_kv", chosen.chosen());
    check_shape(op, shape)?;
    check(op, heads.len() == shape.kv_heads, || {
        (format!("rows for {} heads", shape.kv_heads), format!("{}", heads.len()))
    })?;
    let count = heads.first().map_or(0, Vec::len);
    for matrix in [&*dst.k, &*dst.v] {
        check_rows(op, "dst", dst.first_row + count, shape.kv_width(), matrix)?;
    }
    // Ascending, so that the last row bounds them all.
    let bounds = |head: &Vec<u32>| Some((*head.first()? as usize, *head.last()? as usize));
    let (low, high) = heads
        .iter()
        .filter_map(bounds)
        .fold((source_offset, source_offset), |(low, high), (first, last)| (low.min(first), high.max(last)));
    check(op, low >= source_offset, || (format!("rows from {source_offset} on"), format!("{low}")))?;
    let needed = if count == 0 { 0 } else { high - source_offset + 1 };
    for matrix in [src.k, src.v] {
        check_rows(op, "src", needed, shape.kv_width(), matrix)?;
    }
    for (head, rows) in heads.iter().enumerate() {
        let cols = head * shape.head_dim..(head + 1) * shape.head_dim;
        for (i, &row) in rows.iter().enumerate() {
            let (from, to) = (row as usize - source_offset, dst.first_row + i);
            dst.k.row_mut(to)[cols.clone()].copy_from_slice(&src.k.row(from)[cols.clone()]);
            dst.v.row_mut(to)[cols.clone()].copy_from_slice(&src.v.row(from)[cols.clone()]);
        }
    }
    Ok(())
}
