//! The softmax of rows whose scores arrive block by block.
//!
//! Invariant: `sum` and the outputs that go with it are relative to `2^maximum`.

use pulp::{Simd, WithSimd, as_arrays, as_arrays_mut};

use super::keys::KeyBlock;
use crate::cpu::simd::exp2;
use crate::cpu::view::ViewMut;

/// What the softmax has seen of each row.
pub(super) struct Softmax {
    /// The largest base-2 score so far; -inf before the first.
    pub maximum: Vec<f32>,
    /// The sum of `2^(score - maximum)`.
    pub sum: Vec<f32>,
}

impl Softmax {
    pub fn new(rows: usize) -> Self {
        Self { maximum: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows] }
    }

    /// The natural logarithm of the sum of the exponentials of a row's scores; -inf if it saw none.
    pub fn log_sum_exp(&self, row: usize) -> f32 {
        (self.maximum[row] + self.sum[row].log2()) * std::f32::consts::LN_2
    }

    /// Adds what `other` saw of a row; returns the factors that bring the outputs of the two to a common maximum.
    pub fn absorb(&mut self, row: usize, other: &Softmax) -> (f32, f32) {
        let maximum = self.maximum[row].max(other.maximum[row]);
        let base = finite_base(maximum);
        let (keep, add) = ((self.maximum[row] - base).exp2(), (other.maximum[row] - base).exp2());
        self.sum[row] = self.sum[row] * keep + other.sum[row] * add;
        self.maximum[row] = maximum;
        (keep, add)
    }
}

/// What differences are taken against: -inf minus -inf would be NaN, and against 0 comes out as it should, as -inf.
#[inline(always)]
fn finite_base(maximum: f32) -> f32 {
    if maximum == f32::NEG_INFINITY { 0.0 } else { maximum }
}

/// Turns a block of scores into weights, and brings the rows' outputs so far to the new maxima.
pub(super) struct SoftmaxBlock<'a> {
    /// `[rows, keys of the block]`; those that a query may not see become 0.
    pub scores: ViewMut<'a>,
    pub block: &'a KeyBlock,
    /// Rows of a query.
    pub group: usize,
    pub state: &'a mut Softmax,
    /// `[rows, head_dim]`.
    pub out: ViewMut<'a>,
}

impl WithSimd for SoftmaxBlock<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for row in 0..self.scores.rows {
            let scores = self.scores.row_mut(row);
            let (seen, unseen) = scores.split_at_mut(self.block.visible(row / self.group));
            unseen.fill(0.0);
            let before = self.state.maximum[row];
            let maximum = before.max(row_maximum(simd, seen));
            let base = finite_base(maximum);
            let sum = exponentials(simd, seen, base);
            if maximum > before {
                let keep = (before - base).exp2();
                let out = S::as_mut_simd_f32s(self.out.row_mut(row));
                let factor = simd.splat_f32s(keep);
                out.0.iter_mut().for_each(|x| *x = simd.mul_f32s(*x, factor));
                out.1.iter_mut().for_each(|x| *x *= keep);
                self.state.sum[row] *= keep;
            }
            self.state.sum[row] += sum;
            self.state.maximum[row] = maximum;
        }
    }
}

/// The largest score of a row; a NaN may or may not show.
#[inline(always)]
fn row_maximum<S: Simd>(simd: S, scores: &[f32]) -> f32 {
    let (heads, tail) = S::as_simd_f32s(scores);
    let (fours, rest) = as_arrays::<4, _>(heads);
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let (mut a, mut b, mut c, mut d) = (lowest, lowest, lowest, lowest);
    for &[x, y, z, w] in fours {
        a = simd.max_f32s(a, x);
        b = simd.max_f32s(b, y);
        c = simd.max_f32s(c, z);
        d = simd.max_f32s(d, w);
    }
    for &x in rest {
        a = simd.max_f32s(a, x);
    }
    let most = simd.reduce_max_f32s(simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d)));
    tail.iter().copied().fold(most, f32::max)
}

/// Replaces scores by `2^(score - base)` and returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(simd: S, scores: &mut [f32], base: f32) -> f32 {
    let (heads, tail) = S::as_mut_simd_f32s(scores);
    let (fours, rest) = as_arrays_mut::<4, _>(heads);
    let (base, zero) = (simd.splat_f32s(base), simd.splat_f32s(0.0));
    let (mut a, mut b, mut c, mut d) = (zero, zero, zero, zero);
    for [x, y, z, w] in fours {
        *x = exp2(simd, simd.sub_f32s(*x, base));
        *y = exp2(simd, simd.sub_f32s(*y, base));
        *z = exp2(simd, simd.sub_f32s(*z, base));
        *w = exp2(simd, simd.sub_f32s(*w, base));
        a = simd.add_f32s(a, *x);
        b = simd.add_f32s(b, *y);
        c = simd.add_f32s(c, *z);
        d = simd.add_f32s(d, *w);
    }
    for x in rest {
        *x = exp2(simd, simd.sub_f32s(*x, base));
        a = simd.add_f32s(a, *x);
    }
    let mut sum = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
    if !tail.is_empty() {
        let last = exp2(simd, simd.sub_f32s(simd.partial_load_f32s(tail), base));
        simd.partial_store_f32s(tail, last);
        sum += tail.iter().sum::<f32>();
    }
    sum
}
