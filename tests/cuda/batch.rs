//! Batches of decodes: what a sequence gets is the same to the bit, whoever decodes beside it.

use apbd::backend::cuda::{Cuda, CudaMatrix, CudaOptions, KvCacheType, ProductPath};
use apbd::backend::{AttentionTask, Backend, HeadShape, KvMut, KvRef, Mask};
use half::bf16;

use super::attention::{Case, check_kept, segment, shape};
use super::values::{Steps, Values, judge, poisoned, product};
use super::{MEMORY_BYTES, Test};

pub const TESTS: &[Test] = &[
    ("a_product_of_few_rows_is_the_same_for_each_alone", products),
    ("an_mlp_of_few_rows_is_the_same_for_each_alone", mlp),
    ("products_by_the_other_kernels_are_right_too", other_products),
    ("rope_writes_each_row_to_its_own_place", rope),
    ("rope_writes_each_row_to_its_own_place_in_fp8", rope_fp8),
    ("decodes_of_a_batch_attend_to_their_own_keys", attention),
    ("a_decode_is_the_same_alone_and_in_a_batch", alone_and_together),
];

/// Counts of rows around the sizes of the kernels.
const COUNTS: [usize; 9] = [1, 2, 5, 8, 9, 16, 17, 31, 32];

fn open(kv_cache: KvCacheType, products: ProductPath) -> Cuda {
    let options = CudaOptions { memory_bytes: Some(MEMORY_BYTES), kv_cache, products, ..CudaOptions::default() };
    Cuda::open(0, &options).unwrap()
}

/// `rows` rows from the first of `all`; what follows them is NaN.
fn first_rows(cuda: &Cuda, all: &Values, rows: usize) -> CudaMatrix {
    let mut matrix = poisoned(cuda, all.rows, all.cols);
    cuda.copy_rows(&all.matrix(cuda), 0, rows, &mut matrix, 0).unwrap();
    matrix
}

/// Checks that of `all` rows, computed by `of` for every count, each is the same as among all.
fn same_in_every_batch<T: PartialEq>(case: &str, width: usize, of: impl Fn(usize) -> Vec<T>) {
    let all = of(*COUNTS.last().unwrap());
    for count in COUNTS {
        let got = of(count);
        assert!(got[..count * width] == all[..count * width], "{case}: {count} rows");
    }
}

fn products(cuda: &Cuda) {
    for (width, inner) in [(8, 8), (40, 264), (72, 1160)] {
        let (x, w) = (Values::random(1, 32, inner, 1.0), Values::random(2, width, inner, 0.2).weight(cuda));
        let (bias, before) = (Values::random(3, 1, width, 1.0).weight(cuda), Values::random(4, 32, width, 1.0));
        for accumulate in [false, true] {
            same_in_every_batch(&format!("[{width}, {inner}], accumulate {accumulate}"), width, |rows| {
                let mut out = if accumulate { before.matrix(cuda) } else { poisoned(cuda, 32, width) };
                cuda.linear(rows, &first_rows(cuda, &x, rows), &w, Some(&bias), accumulate, &mut out).unwrap();
                let bits = cuda.read_matrix(&out).unwrap();
                let untouched = if accumulate { before.matrix(cuda) } else { poisoned(cuda, 32, width) };
                assert!(bits[rows * width..] == cuda.read_matrix(&untouched).unwrap()[rows * width..]);
                bits
            });
        }
    }
}

fn mlp(cuda: &Cuda) {
    let (hidden, width) = (72, 136);
    let (h, x) = (Values::random(1, 32, hidden, 1.0), Values::random(2, 32, hidden, 1.0));
    let gate_up = Values::random(3, 2 * width, hidden, 0.3).weight(cuda);
    let down = Values::random(4, hidden, width, 0.3).weight(cuda);
    same_in_every_batch("mlp", hidden, |rows| {
        let mut out = x.matrix(cuda);
        cuda.mlp(rows, &first_rows(cuda, &h, rows), &gate_up, &down, &mut out).unwrap();
        cuda.read_matrix(&out).unwrap()
    });
    same_in_every_batch("a part of an mlp", hidden, |rows| {
        let mut sums = cuda.scores(rows, hidden).unwrap();
        cuda.mlp_part(rows, &first_rows(cuda, &h, rows), &gate_up, &down, 16..104, &mut sums, 0).unwrap();
        cuda.read_scores(&sums).unwrap()
    });
}

fn other_products(_: &Cuda) {
    for path in [ProductPath::Vector, ProductPath::Library] {
        let cuda = open(KvCacheType::Bf16, path);
        for (rows, width, inner) in [(1, 8, 8), (1, 136, 1032), (2, 24, 264), (32, 24, 264)] {
            let (x, w) = (Values::random(1, rows, inner, 1.0), Values::random(2, width, inner, 0.2));
            let (bias, before) = (Values::random(3, 1, width, 1.0), Values::random(4, rows, width, 1.0));
            let mut out = before.matrix(&cuda);
            cuda.linear(rows, &x.matrix(&cuda), &w.weight(&cuda), Some(&bias.weight(&cuda)), true, &mut out).unwrap();
            let of = |steps: Steps| {
                let sum = product(&x, &w, steps);
                Values::from_fn(rows, width, |i, j| steps.of(steps.of(sum.at(i, j) + bias.at(0, j)) + before.at(i, j)))
            };
            judge(&format!("{path:?}, {rows} rows"), &Values::read(&cuda, &out, rows, width), of, 1e-3);
        }
    }
}

/// Positions and rows of the cache of a batch of 70, which takes two launches.
fn places() -> (Vec<u32>, Vec<usize>) {
    let positions = (0..70u32).map(|i| i * 977 % 100_003).collect();
    (positions, (0..70).map(|i| i * 7 % 5).collect())
}

fn frequencies(head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect()
}

/// The rows of `packed` rotated together, or each by itself, and the caches they are written to.
fn rotated(
    cuda: &Cuda,
    shape: HeadShape,
    packed: &Values,
    together: bool,
    make: impl Fn() -> CudaMatrix,
) -> (CudaMatrix, Vec<(CudaMatrix, CudaMatrix)>) {
    let ((positions, rows), inv_freq) = (places(), frequencies(shape.head_dim));
    let mut qkv = packed.matrix(cuda);
    let mut caches: Vec<_> = rows.iter().map(|_| (make(), make())).collect();
    let mut places: Vec<_> =
        caches.iter_mut().zip(&rows).map(|((k, v), row)| KvMut { k, v, first_row: *row }).collect();
    if together {
        cuda.rope_store_each(shape, &positions, &inv_freq, 1.25, &mut qkv, places).unwrap();
    } else {
        for (i, place) in places.drain(..).enumerate() {
            cuda.rope_store(shape, i..i + 1, &positions[i..=i], &inv_freq, 1.25, &mut qkv, place).unwrap();
        }
    }
    (qkv, caches)
}

fn rope(cuda: &Cuda) {
    for shape in [shape(2, 1, 16), shape(6, 2, 128), shape(4, 4, 256)] {
        let packed = Values::random(1, 71, shape.qkv_width(), 1.0);
        let run = |together| rotated(cuda, shape, &packed, together, || poisoned(cuda, 5, shape.kv_width()));
        let (together, each) = (run(true), run(false));
        assert!(cuda.read_matrix(&together.0).unwrap() == cuda.read_matrix(&each.0).unwrap(), "{shape:?}");
        for ((k, v), (one_k, one_v)) in together.1.iter().zip(&each.1) {
            assert!(cuda.read_matrix(k).unwrap() == cuda.read_matrix(one_k).unwrap(), "{shape:?}, keys");
            assert!(cuda.read_matrix(v).unwrap() == cuda.read_matrix(one_v).unwrap(), "{shape:?}, values");
        }
    }
}

fn rope_fp8(_: &Cuda) {
    let cuda = open(KvCacheType::Fp8, ProductPath::Skinny);
    for shape in [shape(2, 1, 32), shape(8, 2, 128)] {
        let packed = Values::random(1, 71, shape.qkv_width(), 1.0);
        let blank = Values::random(2, 5, shape.kv_width(), 1.0).matrix(&cuda);
        let make = || {
            let mut kept = cuda.kv_matrix(shape, 5).unwrap();
            cuda.copy_rows(&blank, 0, 5, &mut kept, 0).unwrap();
            kept
        };
        let run = |together| rotated(&cuda, shape, &packed, together, make);
        let (together, each) = (run(true), run(false));
        assert!(cuda.read_matrix(&together.0).unwrap() == cuda.read_matrix(&each.0).unwrap(), "{shape:?}");
        // A cache in FP8 is read by attention alone.
        let q = Values::random(5, 1, shape.qkv_width(), 1.0).matrix(&cuda);
        let attended = |(k, v): &(CudaMatrix, CudaMatrix)| {
            let tasks = [AttentionTask { queries: 0..1, segments: vec![segment(0, 0..5, Mask::Full)] }];
            let mut out = poisoned(&cuda, 1, shape.q_width());
            cuda.attention(shape, &q, &[KvRef { k, v }], &tasks, &mut out, None).unwrap();
            cuda.read_matrix(&out).unwrap()
        };
        for (one, other) in together.1.iter().zip(&each.1) {
            assert!(attended(one) == attended(other), "{shape:?}");
        }
    }
}

/// One query each over a cache of its own, in one or two segments.
fn decodes(shape: HeadShape, lengths: &[usize]) -> Case {
    let task = |(i, length): (usize, &usize)| {
        let local = length / 3;
        let segments = match i % 2 {
            0 => vec![segment(i, 0..*length, Mask::Full)],
            _ => vec![segment(i, 0..local, Mask::Full), segment(i, local..*length, Mask::Causal)],
        };
        AttentionTask { queries: i..i + 1, segments }
    };
    Case { shape, sources: lengths.to_vec(), tasks: lengths.iter().enumerate().map(task).collect() }
}

/// Lengths of a full launch: as many sources as there may be, short but for one that is split.
fn many_lengths() -> Vec<usize> {
    (0..64).map(|i| if i == 40 { 1500 } else { 1 + i * 5 % 90 }).collect()
}

fn attention(cuda: &Cuda) {
    for shape in [shape(8, 2, 64), shape(4, 1, 128)] {
        for lengths in [vec![1, 33, 700, 2049], many_lengths()] {
            let name = format!("{shape:?}, {} sequences", lengths.len());
            check_kept(cuda, &name, &decodes(shape, &lengths), &|values| values.matrix(cuda), &Values::clone);
        }
    }
}

fn alone_and_together(_: &Cuda) {
    for kv_cache in [KvCacheType::Bf16, KvCacheType::Fp8] {
        let cuda = open(kv_cache, ProductPath::Skinny);
        for shape in [shape(8, 2, 64), shape(4, 1, 128)] {
            let lengths = [1200, 1, 33, 4100, 64, 77];
            let case = decodes(shape, &lengths);
            let kept = |seed: u64, rows: usize| {
                let mut kept = cuda.kv_matrix(shape, rows).unwrap();
                let values = Values::random(seed, rows, shape.kv_width(), 2.0).matrix(&cuda);
                cuda.copy_rows(&values, 0, rows, &mut kept, 0).unwrap();
                kept
            };
            let caches: Vec<_> =
                (10u64..).zip(&lengths).map(|(i, rows)| (kept(i, *rows), kept(i + 20, *rows))).collect();
            let sources: Vec<_> = caches.iter().map(|(k, v)| KvRef { k, v }).collect();
            let q = Values::random(1, lengths.len(), shape.qkv_width(), 2.0).matrix(&cuda);
            let run = |tasks: &[AttentionTask]| {
                let mut out = poisoned(&cuda, lengths.len(), shape.q_width());
                cuda.attention(shape, &q, &sources, tasks, &mut out, None).unwrap();
                cuda.read_matrix(&out).unwrap()
            };
            let together = run(&case.tasks);
            assert!(together.iter().all(|bits| bf16::from_bits(*bits).is_finite()));
            for (i, task) in case.tasks.iter().enumerate() {
                let row = i * shape.q_width()..(i + 1) * shape.q_width();
                let alone = run(std::slice::from_ref(task));
                assert!(alone[row.clone()] == together[row], "{kv_cache:?}, {shape:?}, sequence {i}");
            }
        }
    }
}
