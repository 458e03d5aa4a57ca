//! Which rows are passed on: query-aware scores, max-pool, top-k with its tie rule, gathering.
//!
//! Invariant: the choice follows from the scores alone; of equals the lowest column wins.

use std::ops::Range;

use rayon::prelude::*;

use super::matrix::{Matrix, Rows};
use super::vector;
use crate::backend::{HeadShape, KvMut, KvRef};

/// Columns either side that the max-pool looks at.
const POOL_REACH: usize = 2;

/// `out[h, i]`: mean over the query rows and the query heads of group `h` of `q · k`, scaled by `1/sqrt(head_dim)`.
/// The mean of products is the product with the mean.
pub(super) fn query_aware(
    shape: HeadShape,
    queries: Range<usize>,
    q: &Matrix,
    rows: usize,
    k: &Matrix,
    out: &mut Matrix,
) {
    let (dim, group, columns) = (shape.head_dim, shape.group(), out.cols());
    let weight = 1.0 / (queries.len() * group) as f32 / (dim as f32).sqrt();
    for (head, scores) in out.data_mut().chunks_exact_mut(columns).take(shape.kv_heads).enumerate() {
        let mut mean = vec![0.0; dim];
        for row in queries.clone() {
            for part in q.row(row)[head * group * dim..][..group * dim].chunks_exact(dim) {
                mean.iter_mut().zip(part).for_each(|(sum, &value)| *sum += value * weight);
            }
        }
        scores[..rows].par_iter_mut().with_min_len(256).enumerate().for_each(|(i, score)| {
            *score = vector::dot(&mean, &k.row(i)[head * dim..][..dim]);
        });
    }
}

/// What a top-k chooses from.
pub(super) struct Candidates {
    /// Columns that stand before the candidates in the pooled sequence.
    pub before: Range<usize>,
    /// Columns to choose from, but for the first `excluded`.
    pub columns: Range<usize>,
    /// Columns at the start that take part in the pooling alone.
    pub excluded: usize,
}

/// For each row of scores, the `k` best candidates.
pub(super) fn top_k(scores: &Matrix, candidates: &Candidates, k: usize, pool: bool) -> Rows {
    let chosen =
        scores.data().par_chunks_exact(scores.cols()).map(|scores| best(scores, candidates, k, pool)).collect();
    Rows::new(chosen)
}

fn best(scores: &[f32], candidates: &Candidates, k: usize, pool: bool) -> Vec<u32> {
    let before = &scores[candidates.before.clone()];
    let reach = before.len().min(POOL_REACH);
    let sequence = [&before[before.len() - reach..], &scores[candidates.columns.clone()]].concat();
    let value = |i: usize| {
        if !pool {
            return sequence[i];
        }
        let window = i.saturating_sub(POOL_REACH)..(i + POOL_REACH + 1).min(sequence.len());
        sequence[window].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    };
    let mut ranked: Vec<(f32, u32)> = (reach + candidates.excluded..sequence.len())
        .map(|i| (value(i), (i - reach + candidates.columns.start) as u32))
        .collect();
    let k = k.min(ranked.len());
    if k < ranked.len() {
        ranked.select_nth_unstable_by(k, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    }
    let mut columns: Vec<u32> = ranked[..k].iter().map(|&(_, column)| column).collect();
    columns.sort_unstable();
    columns
}

/// `dst[first_row + i, h] = src[chosen[h][i] - source_offset, h]` for keys and values.
pub(super) fn gather(
    shape: HeadShape,
    chosen: &Rows,
    source_offset: usize,
    src: &KvRef<'_, Matrix>,
    dst: KvMut<'_, Matrix>,
) {
    let dim = shape.head_dim;
    for (from, to) in [(src.k, dst.k), (src.v, dst.v)] {
        for (head, rows) in chosen.chosen().iter().enumerate() {
            let columns = head * dim..(head + 1) * dim;
            for (i, &row) in rows.iter().enumerate() {
                let to = to.rows_in_mut(dst.first_row + i..dst.first_row + i + 1);
                to[columns.clone()].copy_from_slice(&from.row(row as usize - source_offset)[columns.clone()]);
            }
        }
    }
}
