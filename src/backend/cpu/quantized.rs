//! Keys and values in FP8 (e4m3), with a scale for every row and KV head: the arithmetic of kernels/passing_fp8.cu, in software.
//!
//! A row is `[key codes | value codes | key scales | value scales]`, its bytes in the elements of an f32 matrix.
//!
//! Invariant: element = code * scale; a scale has no more bits than a bf16, is never 0, and is NaN if an element of the head is not finite.

use super::check_shape;
use super::linear::check_rows;
use super::matrix::Matrix;
use crate::{BackendError, HeadShape, KvMut, KvRef};

/// The largest value of e4m3.
const LARGEST: f32 = 448.0;

/// A matrix for quantised rows.
pub(super) fn matrix(shape: HeadShape, rows: usize) -> Result<Matrix, BackendError> {
    Matrix::allocate("quantized_kv", rows, words(shape))
}

/// See [`quantize_kv`](crate::Backend::quantize_kv).
pub(super) fn quantize(
    shape: HeadShape,
    kv: KvRef<'_, Matrix>,
    row: usize,
    rows: usize,
    out: &mut Matrix,
    out_row: usize,
) -> Result<(), BackendError> {
    let op = "quantize_kv";
    check_shape(op, shape)?;
    check_rows(op, "keys", row + rows, shape.kv_width(), kv.k)?;
    check_rows(op, "values", row + rows, shape.kv_width(), kv.v)?;
    check_rows(op, "out", out_row + rows, words(shape), out)?;
    let (width, scales) = (shape.kv_width(), 2 * shape.kv_width());
    let mut bytes = vec![0u8; shape.quantized_row_bytes()];
    for i in 0..rows {
        for (part, from) in [kv.k.row(row + i), kv.v.row(row + i)].into_iter().enumerate() {
            for (head, elements) in from.chunks(shape.head_dim).enumerate() {
                let scale = scale_of(elements);
                let codes = &mut bytes[part * width + head * shape.head_dim..][..shape.head_dim];
                codes.iter_mut().zip(elements).for_each(|(code, element)| *code = to_code(element / scale));
                let at = scales + (part * shape.kv_heads + head) * size_of::<f32>();
                let kept = if elements.iter().all(|element| element.is_finite()) { scale } else { f32::NAN };
                bytes[at..at + size_of::<f32>()].copy_from_slice(&kept.to_le_bytes());
            }
        }
        let words = bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word));
        out.row_mut(out_row + i).iter_mut().zip(words).for_each(|(to, word)| *to = word);
    }
    Ok(())
}

/// See [`restore_kv`](crate::Backend::restore_kv).
pub(super) fn restore(
    shape: HeadShape,
    from: &Matrix,
    row: usize,
    rows: usize,
    kv: KvMut<'_, Matrix>,
) -> Result<(), BackendError> {
    let op = "restore_kv";
    check_shape(op, shape)?;
    check_rows(op, "from", row + rows, words(shape), from)?;
    check_rows(op, "keys", kv.first_row + rows, shape.kv_width(), kv.k)?;
    check_rows(op, "values", kv.first_row + rows, shape.kv_width(), kv.v)?;
    let (width, scales) = (shape.kv_width(), 2 * shape.kv_width());
    for i in 0..rows {
        let bytes: Vec<u8> = from.row(row + i).iter().flat_map(|word| word.to_le_bytes()).collect();
        for (part, to) in [&mut *kv.k, &mut *kv.v].into_iter().enumerate() {
            let codes = bytes[part * width..][..width].chunks(shape.head_dim);
            let heads = to.row_mut(kv.first_row + i).chunks_mut(shape.head_dim).zip(codes);
            for (head, (elements, codes)) in heads.enumerate() {
                let at = scales + (part * shape.kv_heads + head) * size_of::<f32>();
                let scale = f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                elements.iter_mut().zip(codes).for_each(|(element, code)| *element = of_code(*code) * scale);
            }
        }
    }
    Ok(())
}

/// Columns of a matrix of quantised rows.
fn words(shape: HeadShape) -> usize {
    shape.quantized_row_bytes() / size_of::<f32>()
}

/// The least scale for these elements: the largest of them / 448, rounded up.
fn scale_of(elements: &[f32]) -> f32 {
    let largest = elements.iter().fold(0.0f32, |largest, element| largest.max(element.abs()));
    match largest {
        0.0 => 1.0,
        largest => f32::from_bits(((largest / LARGEST).to_bits() + 0xffff) & 0xffff_0000),
    }
}

/// Nearest code, ties to even; what is larger becomes the largest.
fn to_code(value: f32) -> u8 {
    let (bits, size) = (value.to_bits(), value.abs());
    let sign = (bits >> 24) as u8 & 0x80;
    if size >= LARGEST {
        return sign | 0x7e;
    }
    // Below the least normal value codes are multiples of 2^-9; eight of them are its code.
    if size < 1.0 / 64.0 {
        return sign | (size * 512.0).round_ties_even() as u8;
    }
    let rounded = (bits & 0x7fff_ffff).wrapping_add(0x7_ffff + (bits >> 20 & 1));
    sign | ((rounded >> 20).wrapping_sub(120 << 3)) as u8
}

/// A code's value: its bits are those of an f32 that is smaller by 2^120.
fn of_code(code: u8) -> f32 {
    let bits = (u32::from(code) & 0x80) << 24 | (u32::from(code) & 0x7f) << 20;
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All finite codes that are not negative, with their values by definition.
    fn codes() -> Vec<(u8, f64)> {
        let value = |code: u8| match (i32::from(code >> 3), f64::from(code & 7)) {
            (0, mantissa) => mantissa / 512.0,
            (exponent, mantissa) => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
        };
        (0..0x7f).map(|code| (code, value(code))).collect()
    }

    #[test]
    fn codes_have_the_values_of_e4m3() {
        for (code, value) in codes() {
            assert_eq!(f64::from(of_code(code)), value, "{code:#x}");
            assert_eq!(f64::from(of_code(code | 0x80)), -value, "{code:#x}");
            assert_eq!((to_code(value as f32), to_code(-value as f32)), (code, code | 0x80));
        }
    }

    #[test]
    fn what_lies_between_two_codes_becomes_the_nearer_one_and_of_two_the_even_one() {
        for pair in codes().windows(2) {
            let ((low, below), (high, above)) = (pair[0], pair[1]);
            let middle = (below + above) / 2.0;
            let even = if low.is_multiple_of(2) { low } else { high };
            let step = (above - below) / 100.0;
            let got = [middle - step, middle, middle + step].map(|value| to_code(value as f32));
            assert_eq!(got, [low, even, high], "between {below} and {above}");
        }
        assert_eq!((to_code(449.0), to_code(-1e30)), (0x7e, 0xfe));
    }

    #[test]
    fn a_row_comes_back_within_half_a_step_and_nothing_else_is_touched() {
        let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 6 };
        // Heads of very different sizes, zeros, a value that is not finite.
        let element = |i: usize| ((i * 37 % 101) as f32 - 50.0) * [1e-4, 3.0, 0.0, 700.0][i / 6 % 4];
        let mut k = Matrix::from_vec(5, 12, (0..60).map(element).collect());
        let v = Matrix::from_vec(5, 12, (0..60).map(|i| element(i + 18)).collect());
        k.row_mut(3)[7] = f32::INFINITY;
        let mut travelling = matrix(shape, 4).expect("memory");
        quantize(shape, KvRef { k: &k, v: &v }, 2, 2, &mut travelling, 1).expect("fits");
        let (mut back_k, mut back_v) = (Matrix::zeros(4, 12), Matrix::zeros(4, 12));
        [&mut back_k, &mut back_v].into_iter().for_each(|back| back.data_mut().fill(7.0));
        let kv = KvMut { k: &mut back_k, v: &mut back_v, first_row: 2 };
        restore(shape, &travelling, 1, 2, kv).expect("fits");
        for (from, back) in [(&k, &back_k), (&v, &back_v)] {
            for (row, head) in (0..2).flat_map(|row| [0, 1].map(|head| (row, head))) {
                let from = &from.row(2 + row)[head * 6..][..6];
                let back = &back.row(2 + row)[head * 6..][..6];
                if from.iter().any(|element| !element.is_finite()) {
                    assert!(back.iter().all(|element| element.is_nan()), "{back:?}");
                    continue;
                }
                let largest = from.iter().fold(0.0f32, |largest, element| largest.max(element.abs()));
                for (from, back) in from.iter().zip(back) {
                    // Half of the last of four bits, or of a step of the least values; a scale may be larger by a bf16's last bit.
                    let allowed = (from.abs() / 16.0).max(1.01 * largest / LARGEST / 1024.0);
                    assert!((from - back).abs() <= allowed, "{from} came back as {back}");
                }
            }
        }
        assert!(back_k.data()[..24].iter().chain(&back_v.data()[..24]).all(|element| *element == 7.0));
    }
}
