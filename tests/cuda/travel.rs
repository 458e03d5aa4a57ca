//! What keys, values and queries go through on their way between ranks: by head and back, in FP8 and back.

use apbd::backend::cpu::{Cpu, Matrix};
use apbd::backend::cuda::Cuda;
use apbd::backend::{Backend, BackendError, HeadShape, KvMut, KvRef};
use half::bf16;

use super::Test;
use super::values::{Values, poisoned};

pub const TESTS: &[Test] = &[
    ("columns_are_stacked_and_come_back", columns),
    ("columns_that_are_not_there_are_refused", refused_columns),
    ("what_travels_in_fp8_comes_back_as_on_the_cpu", quantized),
];

fn columns(cuda: &Cuda) {
    for (rows, groups, width, first_col, cols) in
        [(1, 1, 8, 0, 8), (37, 3, 16, 8, 64), (700, 8, 128, 4096, 6144), (5, 2, 512, 0, 1024)]
    {
        let case = format!("{rows} rows, {groups} groups of {width} from {first_col} of {cols}");
        let (src_row, dst_row) = (3, 2);
        let src = Values::random(1, src_row + rows, cols, 1.0);
        let mut stacked = poisoned(cuda, dst_row + groups * rows + 1, width);
        cuda.stack_columns(&src.matrix(cuda), (src_row, first_col), rows, groups, &mut stacked, dst_row).unwrap();
        let got = Values::read(cuda, &stacked, dst_row + groups * rows + 1, width);
        for (row, col) in (0..got.rows).flat_map(|row| (0..width).map(move |col| (row, col))) {
            match row.checked_sub(dst_row).filter(|row| *row < groups * rows) {
                Some(at) => {
                    let expected = src.at(src_row + at % rows, first_col + at / rows * width + col);
                    assert_eq!(got.at(row, col), expected, "{case}: {row}, {col}");
                }
                None => assert!(got.at(row, col).is_nan(), "{case}: row {row} was not asked for"),
            }
        }
        let mut back = poisoned(cuda, rows + 2, cols);
        cuda.unstack_columns(&stacked, dst_row, rows, groups, &mut back, 1).unwrap();
        let back = Values::read(cuda, &back, rows + 2, cols);
        for (row, col) in (0..back.rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
            if (1..=rows).contains(&row) && col < groups * width {
                assert_eq!(back.at(row, col), src.at(src_row + row - 1, first_col + col), "{case}: {row}, {col}");
            } else {
                assert!(back.at(row, col).is_nan(), "{case}: {row}, {col} was not asked for");
            }
        }
    }
}

fn refused_columns(cuda: &Cuda) {
    let matrix = |rows, cols| cuda.matrix(rows, cols).unwrap();
    let refused = |outcome: Result<(), BackendError>| assert!(matches!(outcome, Err(BackendError::Shape { .. })));
    refused(cuda.stack_columns(&matrix(4, 32), (0, 8), 4, 2, &mut matrix(8, 16), 0));
    refused(cuda.stack_columns(&matrix(4, 32), (1, 0), 4, 2, &mut matrix(8, 16), 0));
    refused(cuda.stack_columns(&matrix(4, 32), (0, 0), 4, 2, &mut matrix(8, 16), 1));
    refused(cuda.stack_columns(&matrix(4, 32), (0, 4), 4, 1, &mut matrix(8, 16), 0));
    refused(cuda.unstack_columns(&matrix(8, 16), 0, 4, 3, &mut matrix(4, 64), 0));
    refused(cuda.unstack_columns(&matrix(8, 16), 0, 4, 2, &mut matrix(4, 24), 0));
}

/// Keys and values on both backends: heads of different sizes, one of zeros, one with a NaN.
fn of_both(cuda: &Cuda, seed: u64, rows: usize, shape: HeadShape) -> (Matrix, apbd::backend::cuda::CudaMatrix) {
    let mut values = Values::random(seed, rows, shape.kv_width(), 1.0);
    for (head, elements) in values.data.chunks_mut(shape.head_dim).enumerate() {
        let size = [1.0, 3e-5, 0.0, 900.0, 1e9][(head + seed as usize) % 5];
        elements.iter_mut().for_each(|element| *element = super::values::rounded(*element * size));
    }
    values.data[shape.kv_width() + 3] = f64::NAN;
    let plain = values.data.iter().map(|value| *value as f32).collect();
    (Matrix::from_vec(rows, shape.kv_width(), plain), values.matrix(cuda))
}

fn quantized(cuda: &Cuda) {
    let cpu = Cpu::new(1).unwrap();
    for (rows, kv_heads, head_dim) in [(3, 1, 16), (41, 2, 64), (300, 8, 128), (9, 3, 32)] {
        let shape = HeadShape { heads: 2 * kv_heads, kv_heads, head_dim };
        let ((host_k, k), (host_v, v)) = (of_both(cuda, 1, rows, shape), of_both(cuda, 2, rows, shape));
        let (first, count, at, to) = (1, rows - 1, 2, 3);
        let mut host = cpu.quantized_kv(shape, rows + 2).unwrap();
        cpu.quantize_kv(shape, KvRef { k: &host_k, v: &host_v }, first, count, &mut host, at).unwrap();
        let mut device = cuda.quantized_kv(shape, rows + 2).unwrap();
        cuda.quantize_kv(shape, KvRef { k: &k, v: &v }, first, count, &mut device, at).unwrap();
        let blank = || Matrix::from_vec(rows + to, shape.kv_width(), vec![7.0; (rows + to) * shape.kv_width()]);
        let (mut host_k, mut host_v) = (blank(), blank());
        cpu.restore_kv(shape, &host, at, count, KvMut { k: &mut host_k, v: &mut host_v, first_row: to }).unwrap();
        let (mut k, mut v) = (poisoned(cuda, rows + to, shape.kv_width()), poisoned(cuda, rows + to, shape.kv_width()));
        cuda.restore_kv(shape, &device, at, count, KvMut { k: &mut k, v: &mut v, first_row: to }).unwrap();
        for (host, device) in [(host_k, k), (host_v, v)] {
            let got = cuda.read_matrix(&device).unwrap();
            let untouched = to * shape.kv_width();
            assert!(got[..untouched].iter().all(|bits| *bits == 0xffff));
            let got = got[untouched..][..count * shape.kv_width()].iter().map(|bits| bf16::from_bits(*bits).to_f32());
            for (got, host) in got.zip(&host.data()[untouched..]) {
                // The device has bf16, into which it rounds once.
                let expected = bf16::from_f32(*host).to_f32();
                assert!(got == expected || got.is_nan() && host.is_nan(), "{shape:?}: {got}, not {expected}");
            }
        }
    }
}
