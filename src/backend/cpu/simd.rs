//! Elementary functions on vectors of f32, generic over the instruction set.
//!
//! Invariant: NaN in is NaN out; nothing here hides a number that went wrong.

use pulp::Simd;

/// 1.5 * 2^23: adding it to a small f32 rounds that to a whole number, found in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
/// From here down an f32 power of two is subnormal, and taken as 0: the exponent's bits are all 0.
const LOWEST: f32 = -127.0;
/// 2^f for f in -0.5..=0.5 as a polynomial: minimax in the relative error, 2e-9 before rounding.
const EXP2: [f32; 7] =
    [1.0, std::f32::consts::LN_2, 0.240_226_46, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_12];
/// log2(e), and what an f32 cannot hold of it.
const LOG2_E: [f32; 2] = [std::f32::consts::LOG2_E, 1.925_963e-8];

/// `2^(whole + f)` where `rounded = whole + ROUND + 127`; 0 where `whole` is -127.
#[inline(always)]
fn power<S: Simd>(simd: S, f: S::f32s, rounded: S::f32s) -> S::f32s {
    // Written out: a loop over the coefficients would stay one where the compiler optimises little.
    let p = simd.mul_add_f32s(simd.splat_f32s(EXP2[6]), f, simd.splat_f32s(EXP2[5]));
    let p = simd.mul_add_f32s(p, f, simd.splat_f32s(EXP2[4]));
    let p = simd.mul_add_f32s(p, f, simd.splat_f32s(EXP2[3]));
    let p = simd.mul_add_f32s(p, f, simd.splat_f32s(EXP2[2]));
    let p = simd.mul_add_f32s(p, f, simd.splat_f32s(EXP2[1]));
    let p = simd.mul_add_f32s(p, f, simd.splat_f32s(EXP2[0]));
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(exponent))
}

/// `2^x` for x up to 127; 0 below -126.5.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND + 127.0);
    let x = at_least(simd, LOWEST, x);
    let rounded = simd.add_f32s(x, round);
    let f = simd.sub_f32s(x, simd.sub_f32s(rounded, round));
    power(simd, f, rounded)
}

/// `e^x` for x up to 88; 0 below -87.7.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND + 127.0);
    let x = at_least(simd, LOWEST * std::f32::consts::LN_2, x);
    let rounded = simd.mul_add_f32s(x, simd.splat_f32s(LOG2_E[0]), round);
    let whole = simd.sub_f32s(rounded, round);
    let f = simd.mul_add_f32s(x, simd.splat_f32s(LOG2_E[0]), simd.neg_f32s(whole));
    let f = simd.mul_add_f32s(x, simd.splat_f32s(LOG2_E[1]), f);
    power(simd, f, rounded)
}

/// The larger of `x` and `least`; NaN where `x` is NaN.
#[inline(always)]
fn at_least<S: Simd>(simd: S, least: f32, x: S::f32s) -> S::f32s {
    // A maximum takes its second operand where one is NaN, on every instruction set but the scalar one, which drops it.
    let larger = simd.max_f32s(simd.splat_f32s(least), x);
    if S::F32_LANES > 1 { larger } else { simd.select_f32s(simd.equal_f32s(x, x), larger, x) }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Where e^-x would overflow, x * 2^-127 is as good as the true value; where NaN, the order of operands keeps it.
    let exponent = simd.min_f32s(simd.splat_f32s(87.0), simd.neg_f32s(x));
    simd.div_f32s(x, simd.add_f32s(simd.splat_f32s(1.0), exp(simd, exponent)))
}

/// The sums of products of each of `xs` with each of `ys`, all of one length: `[x][y]`.
///
/// Loops, not `array::map`: a closure handed to a function that is not inlined is compiled without the instruction set.
#[inline(always)]
pub(super) fn dots<S: Simd, const X: usize, const Y: usize>(
    simd: S,
    xs: [&[f32]; X],
    ys: [&[f32]; Y],
) -> [[f32; Y]; X] {
    let length = xs[0].len();
    let (mut x_heads, mut x_tails) = ([&[] as &[S::f32s]; X], [&[] as &[f32]; X]);
    let (mut y_heads, mut y_tails) = ([&[] as &[S::f32s]; Y], [&[] as &[f32]; Y]);
    for x in 0..X {
        (x_heads[x], x_tails[x]) = S::as_simd_f32s(&xs[x][..length]);
    }
    for y in 0..Y {
        (y_heads[y], y_tails[y]) = S::as_simd_f32s(&ys[y][..length]);
    }
    let zero = simd.splat_f32s(0.0);
    let (mut x_now, mut y_now, mut sums) = ([zero; X], [zero; Y], [[zero; Y]; X]);
    for i in 0..length / S::F32_LANES {
        for x in 0..X {
            x_now[x] = x_heads[x][i];
        }
        for y in 0..Y {
            y_now[y] = y_heads[y][i];
        }
        add_products(simd, &x_now, &y_now, &mut sums);
    }
    if !x_tails[0].is_empty() {
        for x in 0..X {
            x_now[x] = simd.partial_load_f32s(x_tails[x]);
        }
        for y in 0..Y {
            y_now[y] = simd.partial_load_f32s(y_tails[y]);
        }
        add_products(simd, &x_now, &y_now, &mut sums);
    }
    let mut totals = [[0.0; Y]; X];
    for x in 0..X {
        for y in 0..Y {
            totals[x][y] = simd.reduce_sum_f32s(sums[x][y]);
        }
    }
    totals
}

#[inline(always)]
fn add_products<S: Simd, const X: usize, const Y: usize>(
    simd: S,
    xs: &[S::f32s; X],
    ys: &[S::f32s; Y],
    sums: &mut [[S::f32s; Y]; X],
) {
    for x in 0..X {
        for y in 0..Y {
            sums[x][y] = simd.mul_add_f32s(xs[x], ys[y], sums[x][y]);
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Simd, WithSimd};

    use super::{exp, exp2, silu};
    use crate::cpu::vector::instruction_sets;

    #[derive(Clone, Copy)]
    enum Function {
        Exp,
        Exp2,
        Silu,
    }
    #[derive(Clone)]
    struct Each(Function, Vec<f32>);
    impl WithSimd for Each {
        type Output = Vec<f32>;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let mut out = self.1;
            for x in &mut out {
                let v = simd.splat_f32s(*x);
                let y = match self.0 {
                    Function::Exp => exp(simd, v),
                    Function::Exp2 => exp2(simd, v),
                    Function::Silu => silu(simd, v),
                };
                simd.partial_store_f32s(std::slice::from_mut(x), y);
            }
            out
        }
    }

    fn on_every_instruction_set(function: Each) -> Vec<Vec<f32>> {
        instruction_sets().into_iter().map(|set| set.dispatch(function.clone())).collect()
    }

    fn worst(function: Function, from: f32, to: f32, reference: impl Fn(f64) -> f64) -> f64 {
        let inputs: Vec<f32> = (0..=200_000).map(|i| from + (to - from) * i as f32 / 200_000.0).collect();
        let error = |(&x, y): (&f32, f32)| (f64::from(y) / reference(f64::from(x)) - 1.0).abs();
        let results = on_every_instruction_set(Each(function, inputs.clone()));
        results.into_iter().flat_map(|ys| inputs.iter().zip(ys).map(error).collect::<Vec<_>>()).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_a_millionth_of_the_true_value() {
        let error = worst(Function::Exp, -87.3, 88.0, f64::exp);
        assert!(error < 3e-7, "{error:e}");
    }

    #[test]
    fn exp2_is_within_a_millionth_of_the_true_value() {
        let error = worst(Function::Exp2, -126.0, 127.0, f64::exp2);
        assert!(error < 3e-7, "{error:e}");
    }

    #[test]
    fn silu_is_within_a_millionth_of_the_true_value() {
        for (from, to) in [(-80.0, -1e-3), (1e-3, 80.0)] {
            let error = worst(Function::Silu, from, to, |x| x / (1.0 + (-x).exp()));
            assert!(error < 1e-6, "{error:e}");
        }
    }

    #[test]
    fn the_ends_of_the_range_are_exact() {
        let inputs = vec![0.0, f32::NEG_INFINITY, -1e30, -200.0];
        for out in on_every_instruction_set(Each(Function::Exp2, inputs.clone())) {
            assert_eq!(out, [1.0, 0.0, 0.0, 0.0]);
        }
        for out in on_every_instruction_set(Each(Function::Exp, inputs)) {
            assert_eq!(out, [1.0, 0.0, 0.0, 0.0]);
        }
        for out in on_every_instruction_set(Each(Function::Silu, vec![0.0, 200.0, -200.0])) {
            assert_eq!(out[..2], [0.0, 200.0]);
            assert!((-1e-30..=0.0).contains(&out[2]), "{}", out[2]);
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        for function in [Function::Exp, Function::Exp2, Function::Silu] {
            for out in on_every_instruction_set(Each(function, vec![f32::NAN])) {
                assert!(out[0].is_nan());
            }
        }
    }
}
