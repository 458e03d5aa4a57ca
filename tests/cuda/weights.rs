//! Weights on their way to the device: types, stacking, elements that are not finite.

use apbd::backend::cuda::Cuda;
use apbd::backend::{Backend, DType, WeightView};
use half::f16;

use super::Test;
use super::values::{Values, poisoned, rounded};

pub const TESTS: &[Test] = &[
    ("weights_of_every_type", types),
    ("weights_that_are_not_finite_are_refused", refused),
    ("large_weights_come_whole", large),
];

/// The weight's rows, read back through an embedding.
fn read(cuda: &Cuda, view: &[WeightView<'_>], rows: usize, cols: usize) -> Values {
    let weight = cuda.weight_stacked(view).unwrap();
    let ids: Vec<u32> = (0..rows as u32).collect();
    let mut out = poisoned(cuda, rows, cols);
    cuda.embed(&weight, &ids, &mut out).unwrap();
    Values::read(cuda, &out, rows, cols)
}

fn types(cuda: &Cuda) {
    let (rows, cols) = (5, 24);
    let exact = |i: usize| ((i * 37) % 101) as f32 * 0.013 - 0.6;
    let wide: Vec<u8> = (0..rows * cols).flat_map(|i| exact(i).to_le_bytes()).collect();
    let half: Vec<u8> = (0..rows * cols).flat_map(|i| f16::from_f32(exact(i)).to_le_bytes()).collect();
    let stacked = [
        WeightView { rows, cols, dtype: DType::F32, bytes: &wide },
        WeightView { rows, cols, dtype: DType::F16, bytes: &half },
    ];
    let got = read(cuda, &stacked, 2 * rows, cols);
    for i in 0..rows * cols {
        assert_eq!(got.data[i], rounded(f64::from(exact(i))));
        assert_eq!(got.data[rows * cols + i], rounded(f64::from(f16::from_f32(exact(i)).to_f32())));
    }
}

fn refused(cuda: &Cuda) {
    for (bad, dtype) in
        [(f32::NAN, DType::F32), (f32::INFINITY, DType::F32), (f32::MAX, DType::F32), (f32::NAN, DType::F16)]
    {
        let mut values = [0.5f32; 6 * 8];
        values[4 * 8 + 3] = bad;
        let bytes: Vec<u8> = match dtype {
            DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        };
        let error =
            cuda.weight(WeightView { rows: 6, cols: 8, dtype, bytes: &bytes }).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("row 4, column 3"), "{bad} as {dtype:?}: {error}");
    }
}

fn large(cuda: &Cuda) {
    // Longer than the buffers it goes through, and not a multiple of them.
    let (rows, cols) = (5003, 8 * 1000);
    let of = |row: usize, col: usize| ((row * 31 + col * 7) % 251) as f32 - 125.0;
    let bytes: Vec<u8> = (0..rows)
        .flat_map(|row| (0..cols).flat_map(move |col| half::bf16::from_f32(of(row, col)).to_le_bytes()))
        .collect();
    let got = read(cuda, &[WeightView { rows, cols, dtype: DType::Bf16, bytes: &bytes }], rows, cols);
    for (row, col) in [(0, 0), (2096, 4000), (2097, 1215), (4194, 2430), (rows - 1, cols - 1)] {
        assert_eq!(got.at(row, col), f64::from(of(row, col)));
    }
    let sum: f64 = (0..rows).flat_map(|row| (0..cols).map(move |col| f64::from(of(row, col)))).sum();
    assert_eq!(got.data.iter().sum::<f64>(), sum);
}
