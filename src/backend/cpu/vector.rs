//! Operations on rows, each run with the best instruction set that the machine has.
//!
//! Invariant: rows of any length; lanes beyond the end of a row never reach a result.

// Closures handed to functions that are not inlined are compiled without the instruction set: hence loops over indices.
#![allow(clippy::needless_range_loop)]

use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

use super::simd::{dots, silu};
use super::view::{View, ViewMut};

/// Runs an operation with the best instruction set, which is looked for once.
pub(super) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    instruction_set().dispatch(op)
}

fn instruction_set() -> Arch {
    static BEST: LazyLock<Arch> = LazyLock::new(Arch::new);
    #[cfg(test)]
    if let Some(forced) = FORCED.get() {
        return forced;
    }
    *BEST
}

// What this thread has to use instead of the best, so that tests go through every path of the machine.
#[cfg(test)]
thread_local!(pub(super) static FORCED: std::cell::Cell<Option<Arch>> = const { std::cell::Cell::new(None) });

/// `out = silu(gate) * up`.
pub(super) fn silu_times(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    out.copy_from_slice(gate);
    dispatch(Zip { out, x: up, with: Silu });
}

/// `x = silu(x)`.
pub(super) fn silu_in_place(x: &mut [f32]) {
    dispatch(Map { x, with: Silu });
}

/// `x *= factor`.
pub(super) fn scale(x: &mut [f32], factor: f32) {
    dispatch(Map { x, with: Times(factor) });
}

/// `out = out * keep + x * add`.
pub(super) fn blend(out: &mut [f32], keep: f32, x: &[f32], add: f32) {
    assert_eq!(out.len(), x.len());
    dispatch(Zip { out, x, with: Blend { keep, add } });
}

/// `out = x * factor * weight`, element by element.
pub(super) fn scale_by(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    assert!(x.len() == out.len() && weight.len() == out.len());
    out.copy_from_slice(x);
    dispatch(Zip { out, x: weight, with: Times(factor) });
}

/// The sum of products of two rows.
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    dispatch(Dot { x, y })
}

/// `out[r, j] = x[r] · w[j]`, or `out += …`: a product of few rows, at the speed at which `w` comes from memory.
pub(super) fn few_rows_transposed(x: View<'_>, w: View<'_>, out: ViewMut<'_>, accumulate: bool) {
    assert!(x.cols == w.cols && out.rows == x.rows && out.cols == w.rows, "x wᵀ: shapes");
    dispatch(FewRowsTransposed { x, w, out, accumulate });
}

/// `out += p v` for few rows of `p`, at the speed at which `v` comes from memory.
pub(super) fn few_rows_add(p: View<'_>, v: View<'_>, out: ViewMut<'_>) {
    assert!(p.cols == v.rows && out.rows == p.rows && out.cols == v.cols, "p v: shapes");
    dispatch(FewRowsAdd { p, v, out });
}

/// A function of one vector, or of two.
trait Lanes: Copy {
    fn one<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s;
    fn two<S: Simd>(self, simd: S, out: S::f32s, x: S::f32s) -> S::f32s;
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Times(f32);
#[derive(Clone, Copy)]
struct Blend {
    keep: f32,
    add: f32,
}

impl Lanes for Silu {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        silu(simd, x)
    }
    #[inline(always)]
    fn two<S: Simd>(self, simd: S, out: S::f32s, x: S::f32s) -> S::f32s {
        simd.mul_f32s(silu(simd, out), x)
    }
}

impl Lanes for Times {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        simd.mul_f32s(x, simd.splat_f32s(self.0))
    }
    #[inline(always)]
    fn two<S: Simd>(self, simd: S, out: S::f32s, x: S::f32s) -> S::f32s {
        simd.mul_f32s(self.one(simd, out), x)
    }
}

impl Lanes for Blend {
    #[inline(always)]
    fn one<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        simd.mul_f32s(x, simd.splat_f32s(self.keep))
    }
    #[inline(always)]
    fn two<S: Simd>(self, simd: S, out: S::f32s, x: S::f32s) -> S::f32s {
        simd.mul_add_f32s(x, simd.splat_f32s(self.add), self.one(simd, out))
    }
}

struct Map<'a, F> {
    x: &'a mut [f32],
    with: F,
}

impl<F: Lanes> WithSimd for Map<'_, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (heads, tail) = S::as_mut_simd_f32s(self.x);
        heads.iter_mut().for_each(|x| *x = self.with.one(simd, *x));
        if !tail.is_empty() {
            let last = self.with.one(simd, simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, last);
        }
    }
}

struct Zip<'a, F> {
    out: &'a mut [f32],
    x: &'a [f32],
    with: F,
}

impl<F: Lanes> WithSimd for Zip<'_, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (heads, tail) = S::as_mut_simd_f32s(self.out);
        let (x_heads, x_tail) = S::as_simd_f32s(self.x);
        heads.iter_mut().zip(x_heads).for_each(|(out, &x)| *out = self.with.two(simd, *out, x));
        if !tail.is_empty() {
            let last = self.with.two(simd, simd.partial_load_f32s(tail), simd.partial_load_f32s(x_tail));
            simd.partial_store_f32s(tail, last);
        }
    }
}

struct Dot<'a> {
    x: &'a [f32],
    y: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        dots(simd, [self.x], [self.y])[0][0]
    }
}

struct FewRowsTransposed<'a, 'b> {
    x: View<'a>,
    w: View<'a>,
    out: ViewMut<'b>,
    accumulate: bool,
}

impl FewRowsTransposed<'_, '_> {
    /// All rows of `x` against `N` of `w`.
    #[inline(always)]
    fn columns<S: Simd, const N: usize>(&mut self, simd: S, col: usize) {
        // As many sums at a time as the registers hold.
        let wide = if S::F32_LANES >= 16 { self.x.rows / 4 * 4 } else { 0 };
        for row in (0..wide).step_by(4) {
            self.block::<S, 4, N>(simd, row, col);
        }
        let pairs = wide + (self.x.rows - wide) / 2 * 2;
        for row in (wide..pairs).step_by(2) {
            self.block::<S, 2, N>(simd, row, col);
        }
        if pairs < self.x.rows {
            self.block::<S, 1, N>(simd, pairs, col);
        }
    }

    #[inline(always)]
    fn block<S: Simd, const M: usize, const N: usize>(&mut self, simd: S, row: usize, col: usize) {
        let (mut xs, mut ws) = ([&[] as &[f32]; M], [&[] as &[f32]; N]);
        for m in 0..M {
            xs[m] = self.x.row(row + m);
        }
        for n in 0..N {
            ws[n] = self.w.row(col + n);
        }
        let sums = dots(simd, xs, ws);
        for m in 0..M {
            let out = &mut self.out.row_mut(row + m)[col..col + N];
            for n in 0..N {
                out[n] = if self.accumulate { out[n] + sums[m][n] } else { sums[m][n] };
            }
        }
    }
}

impl WithSimd for FewRowsTransposed<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let whole = self.w.rows / 4 * 4;
        for col in (0..whole).step_by(4) {
            self.columns::<S, 4>(simd, col);
        }
        for col in whole..self.w.rows {
            self.columns::<S, 1>(simd, col);
        }
    }
}

struct FewRowsAdd<'a, 'b> {
    p: View<'a>,
    v: View<'a>,
    out: ViewMut<'b>,
}

impl FewRowsAdd<'_, '_> {
    /// Adds rows `first..first + N` of `v`, weighted.
    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&mut self, simd: S, first: usize) {
        let (mut heads, mut tails) = ([&[] as &[S::f32s]; N], [&[] as &[f32]; N]);
        for n in 0..N {
            (heads[n], tails[n]) = S::as_simd_f32s(self.v.row(first + n));
        }
        for r in 0..self.p.rows {
            let p = &self.p.row(r)[first..first + N];
            let mut weights = [simd.splat_f32s(0.0); N];
            for n in 0..N {
                weights[n] = simd.splat_f32s(p[n]);
            }
            let (out, tail) = S::as_mut_simd_f32s(self.out.row_mut(r));
            for (i, out) in out.iter_mut().enumerate() {
                for n in 0..N {
                    *out = simd.mul_add_f32s(weights[n], heads[n][i], *out);
                }
            }
            if !tail.is_empty() {
                let mut last = simd.partial_load_f32s(tail);
                for n in 0..N {
                    last = simd.mul_add_f32s(weights[n], simd.partial_load_f32s(tails[n]), last);
                }
                simd.partial_store_f32s(tail, last);
            }
        }
    }
}

impl WithSimd for FewRowsAdd<'_, '_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let whole = self.v.rows / 4 * 4;
        for first in (0..whole).step_by(4) {
            self.rows::<S, 4>(simd, first);
        }
        for first in whole..self.v.rows {
            self.rows::<S, 1>(simd, first);
        }
    }
}

/// Every instruction set that this machine has, the plainest first.
#[cfg(test)]
pub(super) fn instruction_sets() -> Vec<Arch> {
    let mut sets = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        sets.extend(pulp::x86::V3::try_new().map(Arch::V3));
        sets.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    #[cfg(target_arch = "aarch64")]
    sets.extend(pulp::aarch64::Neon::try_new().map(Arch::Neon));
    sets
}
