//! Keys and values kept in FP8: what is written, and attention over it.

use apbd::backend::cuda::{Cuda, CudaMatrix, CudaOptions, KvCacheType};
use apbd::backend::{AttentionTask, Backend, HeadShape, KvMut, KvRef, Mask};
use half::bf16;

use super::attention::{check_kept, one_task, segment, shape, shapes};
use super::values::{Values, poisoned};
use super::{MEMORY_BYTES, Test};

pub const TESTS: &[Test] = &[
    ("attention_over_keys_and_values_in_fp8", attention),
    ("rope_writes_the_fp8_that_a_copy_writes", rope),
    ("what_is_not_finite_is_not_hidden_by_fp8", not_finite),
];

fn open() -> Cuda {
    let options =
        CudaOptions { memory_bytes: Some(MEMORY_BYTES), kv_cache: KvCacheType::Fp8, ..CudaOptions::default() };
    Cuda::open(0, &options).unwrap()
}

/// All finite values of e4m3 that are not negative, ascending.
fn e4m3() -> Vec<f32> {
    let value = |code: u32| match (code >> 3, code & 7) {
        (0, mantissa) => mantissa as f32 / 512.0,
        (exponent, mantissa) => (1.0 + mantissa as f32 / 8.0) * 2f32.powi(exponent as i32 - 7),
    };
    (0..0x7f).map(value).collect()
}

/// The nearest of them; of two the one with an even code.
fn nearest(all: &[f32], x: f32) -> f32 {
    let at = all.partition_point(|value| *value < x.abs()).clamp(1, all.len() - 1);
    let (below, above) = (x.abs() - all[at - 1], all[at] - x.abs());
    let code = if below < above || (below == above && (at - 1) % 2 == 0) { at - 1 } else { at };
    all[code].copysign(x)
}

/// What is left of values that were kept, with a scale for every row and head; `restored`: once they are in bf16 again.
fn kept(values: &Values, head_dim: usize, restored: bool) -> Values {
    let all = e4m3();
    let mut kept = Values::from_fn(values.rows, values.cols, |_, _| 0.0);
    for (from, to) in values.data.chunks(head_dim).zip(kept.data.chunks_mut(head_dim)) {
        let largest = from.iter().fold(0f32, |largest, value| largest.max(value.abs() as f32));
        // A power of two, and no smaller.
        let scale = f32::from_bits(((largest / 448.0).to_bits() + 0x7f_ffff) & 0x7f80_0000);
        let scale = if largest > 0.0 { scale } else { 1.0 };
        for (from, to) in from.iter().zip(to) {
            let product = nearest(&all, *from as f32 / scale) * scale;
            *to = f64::from(if restored { bf16::from_f32(product).to_f32() } else { product });
        }
    }
    kept
}

fn place(cuda: &Cuda, shape: HeadShape, values: &Values) -> CudaMatrix {
    let mut matrix = cuda.kv_matrix(shape, values.rows).unwrap();
    // In two pieces, as a cache is written.
    let (from, half) = (values.matrix(cuda), values.rows / 2);
    cuda.copy_rows(&from, half, values.rows - half, &mut matrix, half).unwrap();
    cuda.copy_rows(&from, 0, half, &mut matrix, 0).unwrap();
    matrix
}

fn attention(_: &Cuda) {
    let cuda = open();
    for shape in shapes() {
        let tail =
            || vec![segment(0, 3..203, Mask::Full), segment(1, 0..0, Mask::Full), segment(1, 5..38, Mask::Causal)];
        for (name, queries, segments) in [
            ("one key", 0..1, vec![segment(0, 0..1, Mask::Full)]),
            ("a long cache", 0..1, vec![segment(0, 0..4001, Mask::Full), segment(1, 0..2, Mask::Causal)]),
            ("two queries", 0..2, tail()),
            ("33 queries", 0..33, tail()),
            ("200 queries", 4..204, vec![segment(0, 0..231, Mask::Causal)]),
        ] {
            let place = |values: &Values| place(&cuda, shape, values);
            // Decode multiplies codes as they are.
            let restored = shape.head_dim < 64 || queries.len() * shape.group() > 16;
            let seen = |values: &Values| kept(values, shape.head_dim, restored);
            check_kept(&cuda, &format!("{shape:?} {name}"), &one_task(shape, queries, segments), &place, &seen);
        }
    }
}

/// Output of one query over all rows.
fn attend(cuda: &Cuda, shape: HeadShape, rows: usize, k: &CudaMatrix, v: &CudaMatrix) -> Vec<u16> {
    let q = Values::random(5, 1, shape.qkv_width(), 1.0).matrix(cuda);
    let tasks = [AttentionTask { queries: 0..1, segments: vec![segment(0, 0..rows, Mask::Full)] }];
    let mut out = poisoned(cuda, 1, shape.q_width());
    cuda.attention(shape, &q, &[KvRef { k, v }], &tasks, &mut out, None).unwrap();
    cuda.read_matrix(&out).unwrap()
}

fn rope(_: &Cuda) {
    let cuda = open();
    let (shape, rows) = (shape(4, 2, 64), 7);
    let inv_freq: Vec<f32> = (0..32).map(|i| 0.8f32.powi(i)).collect();
    let positions: Vec<u32> = (100..100 + rows as u32).collect();
    let packed = Values::random(1, rows, shape.qkv_width(), 2.0);
    let rotate = |k: &mut CudaMatrix, v: &mut CudaMatrix| {
        let kv = KvMut { k, v, first_row: 0 };
        cuda.rope_store(shape, 0..rows, &positions, &inv_freq, 1.0, &mut packed.matrix(&cuda), kv).unwrap();
    };
    let plain = || poisoned(&cuda, rows, shape.kv_width());
    let compact = || cuda.kv_matrix(shape, rows).unwrap();
    let (mut k, mut v, mut direct_k, mut direct_v) = (plain(), plain(), compact(), compact());
    rotate(&mut k, &mut v);
    rotate(&mut direct_k, &mut direct_v);
    let (mut copied_k, mut copied_v) = (compact(), compact());
    cuda.copy_rows(&k, 0, rows, &mut copied_k, 0).unwrap();
    cuda.copy_rows(&v, 0, rows, &mut copied_v, 0).unwrap();
    let direct = attend(&cuda, shape, rows, &direct_k, &direct_v);
    assert_eq!(direct, attend(&cuda, shape, rows, &copied_k, &copied_v));
    assert_ne!(direct, attend(&cuda, shape, rows, &k, &v), "it is not exact");
}

fn not_finite(_: &Cuda) {
    let cuda = open();
    let (shape, rows) = (shape(4, 1, 128), 40);
    let keys = Values::random(1, rows, shape.kv_width(), 1.0);
    for broken in [f64::NAN, f64::INFINITY] {
        let mut values = Values::random(2, rows, shape.kv_width(), 1.0);
        values.data[17 * shape.kv_width() + 5] = broken;
        let out = attend(&cuda, shape, rows, &place(&cuda, shape, &keys), &place(&cuda, shape, &values));
        assert!(out.iter().any(|bits| !bf16::from_bits(*bits).is_finite()), "{broken}");
    }
}
