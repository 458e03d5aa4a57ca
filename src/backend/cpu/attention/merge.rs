//! Merging attention over different keys by the log-sum-exps of the two.
//!
//! Invariant: a side whose LSE is -inf contributes nothing, whatever its output holds.

use std::ops::Range;

use crate::cpu::check_shape;
use crate::cpu::linear::check_rows;
use crate::cpu::matrix::{Matrix, Scores};
use crate::cpu::threads::Threads;
use crate::cpu::vector::blend;
use crate::cpu::view::ViewMut;
use crate::{BackendError, HeadShape};

/// Rows worth waking a thread for.
const GRAIN: usize = 64;

/// See [`crate::Backend::merge`]. `part` is the partial's output and LSE, and where its rows start.
pub(in crate::cpu) fn merge(
    threads: &Threads,
    shape: HeadShape,
    rows: Range<usize>,
    out: &mut Matrix,
    lse: &mut Scores,
    part: (&Matrix, &Scores, usize),
) -> Result<(), BackendError> {
    let (part, part_lse, part_first) = part;
    check_shape("merge", shape)?;
    check_rows("merge", "out", rows.end, shape.q_width(), out)?;
    check_rows("merge", "lse", rows.end, shape.heads, lse)?;
    check_rows("merge", "part", part_first + rows.len(), shape.q_width(), part)?;
    check_rows("merge", "part_lse", part_first + rows.len(), shape.heads, part_lse)?;
    let out = ViewMut::of(out, rows.end).split_rows(rows.start).1.tiles(GRAIN, shape.q_width().max(1));
    let lse = ViewMut::of(lse, rows.end).split_rows(rows.start).1.tiles(GRAIN, shape.heads.max(1));
    threads.each(out.into_iter().zip(lse).collect(), |(mut out, mut lse)| {
        for i in 0..out.out.rows {
            let from = part_first + out.row + i;
            let heads = out.out.row_mut(i).chunks_mut(shape.head_dim).zip(part.row(from).chunks(shape.head_dim));
            for ((out, part), (lse, &part_lse)) in heads.zip(lse.out.row_mut(i).iter_mut().zip(part_lse.row(from))) {
                merge_head(out, lse, part, part_lse);
            }
        }
    });
    Ok(())
}

fn merge_head(out: &mut [f32], lse: &mut f32, part: &[f32], part_lse: f32) {
    match (*lse == f32::NEG_INFINITY, part_lse == f32::NEG_INFINITY) {
        (true, true) => out.fill(0.0),
        (false, true) => {}
        (true, false) => {
            out.copy_from_slice(part);
            *lse = part_lse;
        }
        (false, false) => {
            let most = lse.max(part_lse);
            let (own, other) = ((*lse - most).exp(), (part_lse - most).exp());
            blend(out, own / (own + other), part, other / (own + other));
            *lse = most + (own + other).ln();
        }
    }
}
