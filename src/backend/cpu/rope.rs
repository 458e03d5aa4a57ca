//! Rotary position embedding of queries and keys, and where keys and values are kept.
//!
//! Angles are products in f32, as the models were trained with.
//!
//! Invariant: values are copied untouched; rows outside `rows` are neither read nor written.

use std::ops::Range;

use super::linear::check_rows;
use super::matrix::Matrix;
use super::threads::Threads;
use super::view::ViewMut;
use super::{check, check_shape};
use crate::{BackendError, HeadShape, KvMut};

/// Rows worth waking a thread for.
const GRAIN: usize = 64;

/// How far the pairs of a head are turned.
pub(super) struct Angles<'a> {
    /// One a row.
    pub positions: &'a [u32],
    /// Radians per position of each pair.
    pub inv_freq: &'a [f32],
    /// Factor of sine and cosine.
    pub scale: f32,
}

/// See [`crate::Backend::rope_store`].
pub(super) fn rope_store(
    threads: &Threads,
    shape: HeadShape,
    rows: Range<usize>,
    angles: &Angles<'_>,
    qkv: &mut Matrix,
    kv: KvMut<'_, Matrix>,
) -> Result<(), BackendError> {
    let (op, count) = ("rope_store", rows.len());
    check_shape(op, shape)?;
    check_rows(op, "qkv", rows.end, shape.qkv_width(), qkv)?;
    check_rows(op, "k", kv.first_row + count, shape.kv_width(), kv.k)?;
    check_rows(op, "v", kv.first_row + count, shape.kv_width(), kv.v)?;
    check(op, angles.positions.len() == count, || {
        (format!("{count} positions"), format!("{}", angles.positions.len()))
    })?;
    check(op, 2 * angles.inv_freq.len() == shape.head_dim, || {
        (format!("{} frequencies", shape.head_dim / 2), format!("{}", angles.inv_freq.len()))
    })?;
    let work = [
        window(qkv, rows.start, count).tiles(GRAIN, shape.qkv_width().max(1)),
        window(kv.k, kv.first_row, count).tiles(GRAIN, shape.kv_width().max(1)),
        window(kv.v, kv.first_row, count).tiles(GRAIN, shape.kv_width().max(1)),
    ];
    let [qkv, k, v] = work;
    let tiles = qkv.into_iter().zip(k).zip(v).collect();
    threads.each(tiles, |((mut qkv, mut k), mut v)| {
        for i in 0..qkv.out.rows {
            let (sines, cosines) = turns(angles, qkv.row + i);
            let row = qkv.out.row_mut(i);
            let (rotated, values) = row.split_at_mut(shape.q_width() + shape.kv_width());
            rotated.chunks_mut(shape.head_dim).for_each(|head| rotate(head, &sines, &cosines));
            k.out.row_mut(i).copy_from_slice(&rotated[shape.q_width()..]);
            v.out.row_mut(i).copy_from_slice(values);
        }
    });
    Ok(())
}

fn window(matrix: &mut Matrix, first: usize, rows: usize) -> ViewMut<'_> {
    ViewMut::of(matrix, first + rows).split_rows(first).1
}

/// Sines and cosines of every pair at the position of row `row`.
fn turns(angles: &Angles<'_>, row: usize) -> (Vec<f32>, Vec<f32>) {
    let position = angles.positions[row] as f32;
    angles
        .inv_freq
        .iter()
        .map(|freq| (position * freq).sin_cos())
        .map(|(s, c)| (s * angles.scale, c * angles.scale))
        .unzip()
}

/// Turns element `i` with element `i + half`.
fn rotate(head: &mut [f32], sines: &[f32], cosines: &[f32]) {
    let (low, high) = head.split_at_mut(sines.len());
    for ((low, high), (sin, cos)) in low.iter_mut().zip(high).zip(sines.iter().zip(cosines)) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
