//! Loops over rows of numbers, compiled for the widest vectors the processor has.
//!
//! Invariant: the result of a loop depends on its input and length alone, on one machine; no loop allocates.

/// Lanes that loops are unrolled to: one AVX-512 register, two AVX ones.
const LANES: usize = 16;

/// Greatest element; -inf of none.
pub(super) fn max(row: &[f32]) -> f32 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let (chunks, rest) = row.as_chunks::<LANES>();
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for chunk in chunks {
                for (lane, &value) in lanes.iter_mut().zip(chunk) {
                    *lane = if value > *lane { value } else { *lane };
                }
            }
            rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |best, &value| best.max(value))
        },
    )
}

/// `row[i] = exp(row[i] - shift)`; returns their sum.
pub(super) fn exp_shifted(row: &mut [f32], shift: f32) -> f32 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let (chunks, rest) = row.as_chunks_mut::<LANES>();
            let mut lanes = [0.0; LANES];
            for chunk in chunks {
                for (lane, value) in lanes.iter_mut().zip(chunk) {
                    *value = exp(*value - shift);
                    *lane += *value;
                }
            }
            let mut sum: f32 = lanes.iter().sum();
            for value in rest {
                *value = exp(*value - shift);
                sum += *value;
            }
            sum
        },
    )
}

/// `row[i] *= factor`.
pub(super) fn scale(row: &mut [f32], factor: f32) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || row.iter_mut().for_each(|value| *value *= factor),
    );
}

/// `gate[i] = silu(gate[i]) * up[i]`.
pub(super) fn silu_times(gate: &mut [f32], up: &[f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || gate.iter_mut().zip(up).for_each(|(gate, &up)| *gate = silu(*gate) * up),
    );
}

/// `row[i] = silu(row[i])`.
pub(super) fn silu_in_place(row: &mut [f32]) {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || row.iter_mut().for_each(|value| *value = silu(*value)),
    );
}

/// `Σ a[i] b[i]`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || {
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            let mut lanes = [0.0; LANES];
            for (a, b) in a.iter().zip(b) {
                for (lane, (x, y)) in lanes.iter_mut().zip(a.iter().zip(b)) {
                    *lane += x * y;
                }
            }
            lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum::<f32>()
        },
    )
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `e^x` with a relative error under 1e-6 down to -87; 0 below, and as at 88 above.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; adding 1.5 · 2^23 rounds to the integer `n` and leaves it in the low bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, so that n ln 2 loses nothing.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_as_exact_as_a_float_allows() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 1e-6 * exact, "exp({x}) = {}, not {exact}", exp(x));
        }
        assert_eq!((exp(-1000.0), exp(f32::NEG_INFINITY)), (0.0, 0.0));
        assert!(exp(1000.0).is_finite());
    }

    #[test]
    fn loops_agree_with_plain_ones_at_every_length() {
        for n in 0..70 {
            let row: Vec<f32> = (0..n).map(|i| ((i * 37) % 19) as f32 / 3.0 - 4.0).collect();
            assert_eq!(max(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut shifted = row.clone();
            let sum = exp_shifted(&mut shifted, 2.0);
            let exact: f64 = row.iter().map(|&x| (f64::from(x) - 2.0).exp()).sum();
            assert!((f64::from(sum) - exact).abs() <= 1e-5 * exact);
            let exact: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&row, &row)) - exact).abs() <= 1e-5 * exact);
        }
    }
}
