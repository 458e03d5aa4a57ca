//! Every operation against a plain reference in f64, on odd sizes, with poisoned outputs.

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::backend::{DType, Mask, Segment};

const POISON: f32 = f32::NAN;

fn cpu() -> Cpu {
    Cpu::new(3).expect("threads")
}

fn random(rng: &mut StdRng, rows: usize, cols: usize) -> Matrix {
    let mut matrix = Matrix::zeros(rows, cols);
    matrix.data_mut().iter_mut().for_each(|value| *value = rng.random_range(-1.0..1.0));
    matrix
}

fn poisoned(rows: usize, cols: usize) -> Matrix {
    let mut matrix = Matrix::zeros(rows, cols);
    matrix.data_mut().fill(POISON);
    matrix
}

fn poisoned_scores(rows: usize, cols: usize) -> Scores {
    Scores::from_vec(rows, cols, vec![POISON; rows * cols])
}

fn weight(matrix: &Matrix) -> Weight {
    let bytes: Vec<u8> = matrix.data().iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = WeightView { rows: matrix.rows(), cols: matrix.cols(), dtype: DType::F32, bytes: &bytes };
    cpu().weight(view).expect("finite")
}

#[track_caller]
fn assert_close(got: f32, expected: f64, scale: f64) {
    let tolerance = 2e-5 * scale.max(1.0);
    assert!((f64::from(got) - expected).abs() <= tolerance, "{got}, not {expected}");
}

fn product(x: &[f32], w: &Weight, row: usize) -> f64 {
    x.iter().zip(w.matrix().row(row)).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn linear_layers_of_few_and_many_rows() {
    let rng = &mut StdRng::seed_from_u64(1);
    for (rows, inputs, outputs) in [(1, 7, 5), (3, 64, 300), (15, 33, 17), (16, 65, 31), (150, 40, 70), (1, 600, 700)] {
        let (x, w, b) = (random(rng, rows + 1, inputs), random(rng, outputs, inputs), random(rng, 1, outputs));
        let (w, b) = (weight(&w), weight(&b));
        let mut out = poisoned(rows + 1, outputs);
        cpu().linear(rows, &x, &w, Some(&b), false, &mut out).expect("shapes fit");
        let mut twice = out.clone();
        cpu().linear(rows, &x, &w, None, true, &mut twice).expect("shapes fit");
        for row in 0..rows {
            for col in 0..outputs {
                let expected = product(x.row(row), &w, col);
                let bias = f64::from(b.matrix().data()[col]);
                assert_close(out.row(row)[col], expected + bias, inputs as f64);
                assert_close(twice.row(row)[col], 2.0 * expected + bias, inputs as f64);
            }
        }
        assert!(out.row(rows).iter().all(|value| value.is_nan()), "a row beyond the first {rows} was touched");
    }
}

#[test]
fn mlp_of_few_and_many_rows() {
    let rng = &mut StdRng::seed_from_u64(2);
    for (rows, hidden, inner) in [(1, 12, 20), (9, 16, 33), (16, 8, 5), (131, 24, 40)] {
        let (h, gate_up, down) =
            (random(rng, rows, hidden), weight(&random(rng, 2 * inner, hidden)), weight(&random(rng, hidden, inner)));
        let before = random(rng, rows, hidden);
        let mut x = before.clone();
        cpu().mlp(rows, &h, &gate_up, &down, &mut x).expect("shapes fit");
        for row in 0..rows {
            let gated: Vec<f32> = (0..inner)
                .map(|i| (silu(product(h.row(row), &gate_up, i)) * product(h.row(row), &gate_up, inner + i)) as f32)
                .collect();
            for col in 0..hidden {
                let expected = f64::from(before.row(row)[col]) + product(&gated, &down, col);
                assert_close(x.row(row)[col], expected, inner as f64);
            }
        }
    }
}

#[test]
fn weights_of_every_type_are_stacked_and_checked() {
    let f16: Vec<u8> = [1.5_f32, -2.0].iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    let bf16: Vec<u8> = [0.5_f32, 3.0].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let view = |dtype, bytes| WeightView { rows: 1, cols: 2, dtype, bytes };
    let stacked = cpu().weight_stacked(&[view(DType::F16, &f16), view(DType::Bf16, &bf16)]).expect("fits");
    assert_eq!(stacked.matrix().data(), [1.5, -2.0, 0.5, 3.0]);
    let nan: Vec<u8> = [1.0_f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
    let error = cpu().weight(view(DType::F32, &nan)).expect_err("not finite").to_string();
    assert!(error.contains("row 0, column 1"), "{error}");
    assert!(cpu().weight(view(DType::F32, &f16)).is_err(), "too few bytes");
}

#[test]
fn embedding_norm_and_logits() {
    let rng = &mut StdRng::seed_from_u64(3);
    let (table, norm) = (weight(&random(rng, 9, 6)), weight(&random(rng, 1, 6)));
    let mut x = poisoned(4, 6);
    cpu().embed(&table, &[3, 8, 3], &mut x).expect("fits");
    assert_eq!((x.row(0), x.row(1), x.row(2)), (table.matrix().row(3), table.matrix().row(8), table.matrix().row(3)));
    assert!(cpu().embed(&table, &[9], &mut x).is_err(), "a token beyond the vocabulary");
    let mut out = poisoned(3, 6);
    cpu().rms_norm(3, &x, &norm, 1e-5, &mut out).expect("fits");
    let logits = cpu().logits(&x, 1, &norm, 1e-5, &table).expect("fits");
    let mean: f64 = x.row(1).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 6.0;
    for i in 0..6 {
        assert_close(
            out.row(1)[i],
            f64::from(x.row(1)[i]) / (mean + 1e-5).sqrt() * f64::from(norm.matrix().data()[i]),
            1.0,
        );
    }
    for (i, &logit) in logits.iter().enumerate() {
        assert_close(logit, product(out.row(1), &table, i), 6.0);
    }
}

#[test]
fn rope_rotates_queries_and_keys_and_stores_keys_and_values() {
    let rng = &mut StdRng::seed_from_u64(4);
    let shape = HeadShape { heads: 3, kv_heads: 1, head_dim: 4 };
    let inv_freq = [1.0, 0.01];
    let before = random(rng, 5, shape.qkv_width());
    let (mut qkv, mut k, mut v) = (before.clone(), poisoned(6, 4), poisoned(6, 4));
    let kv = KvMut { k: &mut k, v: &mut v, first_row: 3 };
    cpu().rope_store(shape, 1..4, &[7, 8, 60_000], &inv_freq, 1.25, &mut qkv, kv).expect("fits");
    for (row, position) in [(1, 7), (2, 8), (3, 60_000)] {
        for head in 0..4 {
            for (i, frequency) in inv_freq.into_iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                let (sin, cos) = (angle.sin() * 1.25, angle.cos() * 1.25);
                let (a, b) = (f64::from(before.row(row)[head * 4 + i]), f64::from(before.row(row)[head * 4 + i + 2]));
                assert_close(qkv.row(row)[head * 4 + i], a * cos - b * sin, 1.0);
                assert_close(qkv.row(row)[head * 4 + i + 2], b * cos + a * sin, 1.0);
            }
        }
        assert_eq!(k.row(row + 2), &qkv.row(row)[12..16]);
        assert_eq!(v.row(row + 2), &before.row(row)[16..20]);
    }
    assert_eq!((qkv.row(0), qkv.row(4)), (before.row(0), before.row(4)));
    assert!(k.row(2)[0].is_nan(), "a row before the first was written");
}

#[test]
fn retaining_and_query_aware_scores() {
    let rng = &mut StdRng::seed_from_u64(5);
    let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 6 };
    let rows = 131;
    let qkv = random(rng, rows, shape.qkv_width());
    let (w1, w2) = (weight(&random(rng, 10, shape.qkv_width())), weight(&random(rng, 2, 10)));
    let mut scores = poisoned_scores(2, rows + 3);
    cpu().retaining_scores(rows, &qkv, &w1, &w2, &mut scores).expect("fits");
    for row in 0..rows {
        let inner: Vec<f32> = (0..10).map(|i| silu(product(qkv.row(row), &w1, i)) as f32).collect();
        for head in 0..2 {
            assert_close(scores.row(head)[row], product(&inner, &w2, head), 10.0);
        }
    }
    let keys = random(rng, rows, shape.kv_width());
    cpu().query_aware_scores(shape, 2..5, &qkv, rows, &keys, &mut scores).expect("fits");
    for head in 0..2 {
        for row in 0..rows {
            let mut sum = 0.0;
            for query in 2..5 {
                for q_head in [2 * head, 2 * head + 1] {
                    for i in 0..6 {
                        sum += f64::from(qkv.row(query)[q_head * 6 + i]) * f64::from(keys.row(row)[head * 6 + i]);
                    }
                }
            }
            assert_close(scores.row(head)[row], sum / 6.0 / 6.0_f64.sqrt(), 1.0);
        }
    }
}

/// The choice by definition: pool, sort by value and column, take k.
fn chosen_by_definition(
    scores: &[f32],
    before: Range<usize>,
    candidates: Range<usize>,
    excluded: usize,
    k: usize,
    pool: bool,
) -> Vec<u32> {
    let sequence: Vec<f32> = scores[before.clone()].iter().chain(&scores[candidates.clone()]).copied().collect();
    let pooled = |i: usize| {
        let window = if pool { i.saturating_sub(2)..(i + 3).min(sequence.len()) } else { i..i + 1 };
        sequence[window].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    };
    let mut order: Vec<usize> = (before.len() + excluded..sequence.len()).collect();
    order.sort_by(|&a, &b| pooled(b).total_cmp(&pooled(a)).then(a.cmp(&b)));
    let mut chosen: Vec<u32> = order[..k].iter().map(|i| (i - before.len() + candidates.start) as u32).collect();
    chosen.sort_unstable();
    chosen
}

proptest! {
    #[test]
    fn top_k_chooses_what_its_definition_says(
        // Few different values: ties everywhere.
        values in prop::collection::vec(0_u8..6, 1..60),
        anchor in 0_usize..8, excluded in 0_usize..10, k in 0_usize..30, pool: bool,
    ) {
        let values: Vec<f32> = values.iter().map(|&v| f32::from(v)).collect();
        let anchor = anchor.min(values.len());
        let candidates = anchor..values.len();
        let excluded = excluded.min(candidates.len());
        let k = k.min(candidates.len() - excluded);
        let scores = Scores::from_vec(1, values.len(), values.clone());
        let rows = cpu().top_k(&scores, 0..anchor, candidates.clone(), excluded, k, pool).expect("fits");
        prop_assert_eq!(&rows.chosen()[0], &chosen_by_definition(&values, 0..anchor, candidates, excluded, k, pool));
    }
}

#[test]
fn gathering_copies_each_head_of_its_own_rows() {
    let rng = &mut StdRng::seed_from_u64(6);
    let shape = HeadShape { heads: 2, kv_heads: 2, head_dim: 3 };
    let (k, v) = (random(rng, 10, 6), random(rng, 10, 6));
    let (mut to_k, mut to_v) = (poisoned(5, 6), poisoned(5, 6));
    let chosen = Rows::new(vec![vec![5, 9], vec![6, 14]]);
    let src = KvRef { k: &k, v: &v };
    cpu().gather_kv(shape, &chosen, 5, src, KvMut { k: &mut to_k, v: &mut to_v, first_row: 2 }).expect("fits");
    for (from, to) in [(&k, &to_k), (&v, &to_v)] {
        assert_eq!(to.row(2), [&from.row(0)[..3], &from.row(1)[3..]].concat());
        assert_eq!(to.row(3), [&from.row(4)[..3], &from.row(9)[3..]].concat());
        assert!(to.row(4)[0].is_nan(), "a row beyond the last was written");
    }
    let beyond = Rows::new(vec![vec![5], vec![15]]);
    let dst = KvMut { k: &mut to_k, v: &mut to_v, first_row: 0 };
    assert!(cpu().gather_kv(shape, &beyond, 5, KvRef { k: &k, v: &v }, dst).is_err());
}

/// Attention of one query row and head by definition: output and log-sum-exp.
fn attention_by_definition(
    shape: HeadShape,
    q: &Matrix,
    sources: &[(Matrix, Matrix)],
    task: &AttentionTask,
    row: usize,
    head: usize,
) -> (Vec<f64>, f64) {
    let (dim, kv_head) = (shape.head_dim, head / shape.group());
    let mut weighted = Vec::new();
    for segment in &task.segments {
        let index = row - task.queries.start;
        let seen = match segment.mask {
            Mask::Full => segment.rows.len(),
            Mask::Causal => (segment.rows.len() + index + 1).saturating_sub(task.queries.len()).min(segment.rows.len()),
        };
        let (k, v) = &sources[segment.source];
        for key in segment.rows.clone().take(seen) {
            let columns = kv_head * dim..(kv_head + 1) * dim;
            let query = &q.row(row)[head * dim..][..dim];
            let dot: f64 =
                query.iter().zip(&k.row(key)[columns.clone()]).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            weighted.push((dot / (dim as f64).sqrt(), v.row(key)[columns].to_vec()));
        }
    }
    let lse = weighted.iter().map(|(score, _)| score.exp()).sum::<f64>().ln();
    let mut out = vec![0.0; dim];
    for (score, value) in &weighted {
        out.iter_mut().zip(value).for_each(|(out, &value)| *out += (score - lse).exp() * f64::from(value));
    }
    (out, lse)
}

fn assert_attention(shape: HeadShape, source_rows: &[usize], tasks: &[AttentionTask], packed: bool, seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let rows = tasks.iter().map(|task| task.queries.end).max().unwrap_or(0);
    let q = random(rng, rows, if packed { shape.qkv_width() } else { shape.q_width() });
    let kv: Vec<(Matrix, Matrix)> =
        source_rows.iter().map(|&n| (random(rng, n, shape.kv_width()), random(rng, n, shape.kv_width()))).collect();
    let sources: Vec<KvRef<'_, Matrix>> = kv.iter().map(|(k, v)| KvRef { k, v }).collect();
    let (mut out, mut lse) = (poisoned(rows, shape.q_width()), poisoned_scores(rows, shape.heads));
    cpu().attention(shape, &q, &sources, tasks, &mut out, Some(&mut lse)).expect("fits");
    for task in tasks {
        for row in task.queries.clone() {
            for head in 0..shape.heads {
                let (expected, expected_lse) = attention_by_definition(shape, &q, &kv, task, row, head);
                for (i, &value) in expected.iter().enumerate() {
                    assert_close(out.row(row)[head * shape.head_dim + i], value, 1.0);
                }
                if expected_lse == f64::NEG_INFINITY {
                    assert_eq!(lse.row(row)[head], f32::NEG_INFINITY);
                } else {
                    assert_close(lse.row(row)[head], expected_lse, 1.0);
                }
            }
        }
    }
    let asked: Vec<usize> = tasks.iter().flat_map(|task| task.queries.clone()).collect();
    for row in (0..rows).filter(|row| !asked.contains(row)) {
        assert!(out.row(row).iter().all(|value| value.is_nan()), "row {row} belongs to no task");
    }
}

fn segment(source: usize, rows: Range<usize>, mask: Mask) -> Segment {
    Segment { source, rows, mask }
}

#[test]
fn attention_over_segments_of_several_hosts() {
    for (heads, kv_heads, head_dim) in [(4, 2, 64), (4, 1, 16), (2, 2, 128), (6, 3, 8)] {
        let shape = HeadShape { heads, kv_heads, head_dim };
        let tasks = [
            AttentionTask { queries: 0..7, segments: vec![segment(0, 0..7, Mask::Causal)] },
            AttentionTask {
                queries: 9..90,
                segments: vec![
                    segment(1, 3..20, Mask::Full),
                    segment(0, 0..7, Mask::Full),
                    segment(0, 9..90, Mask::Causal),
                ],
            },
            AttentionTask {
                queries: 90..91,
                segments: vec![segment(1, 0..0, Mask::Full), segment(0, 90..91, Mask::Causal)],
            },
            AttentionTask { queries: 92..95, segments: vec![segment(1, 5..5, Mask::Full)] },
            AttentionTask { queries: 95..97, segments: Vec::new() },
        ];
        assert_attention(shape, &[97, 23], &tasks, true, 7);
    }
}

#[test]
fn attention_over_many_keys_is_cut_and_merged() {
    let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 16 };
    let one = [AttentionTask {
        queries: 1..2,
        segments: vec![segment(0, 10..6000, Mask::Full), segment(1, 0..700, Mask::Full)],
    }];
    assert_attention(shape, &[6100, 700], &one, false, 8);
    let few = [AttentionTask {
        queries: 0..20,
        segments: vec![segment(0, 0..4100, Mask::Full), segment(1, 0..20, Mask::Causal)],
    }];
    assert_attention(shape, &[4100, 20], &few, true, 9);
    let many = [AttentionTask {
        queries: 0..300,
        segments: vec![segment(1, 0..513, Mask::Full), segment(0, 0..1300, Mask::Causal)],
    }];
    assert_attention(shape, &[1300, 513], &many, true, 10);
}

#[test]
fn queries_before_a_short_causal_segment_see_nothing_of_it() {
    let shape = HeadShape { heads: 1, kv_heads: 1, head_dim: 8 };
    let tasks = [AttentionTask { queries: 0..5, segments: vec![segment(0, 0..2, Mask::Causal)] }];
    assert_attention(shape, &[2], &tasks, false, 11);
}

#[test]
fn parts_merge_to_the_whole() {
    let rng = &mut StdRng::seed_from_u64(12);
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 8 };
    let (q, k, v) = (random(rng, 3, 16), random(rng, 50, 8), random(rng, 50, 8));
    let run = |rows: Range<usize>| {
        let task = AttentionTask { queries: 0..3, segments: vec![segment(0, rows, Mask::Full)] };
        let (mut out, mut lse) = (poisoned(3, 16), poisoned_scores(3, 2));
        cpu().attention(shape, &q, &[KvRef { k: &k, v: &v }], &[task], &mut out, Some(&mut lse)).expect("fits");
        (out, lse)
    };
    let (whole, whole_lse) = run(0..50);
    let (mut out, mut lse) = run(0..13);
    for rows in [13..13, 13..40, 40..50] {
        let (part, part_lse) = run(rows);
        cpu().merge(shape, 0..3, &mut out, &mut lse, &part, &part_lse, 0).expect("fits");
    }
    for (got, expected) in out.data().iter().zip(whole.data()).chain(lse.data().iter().zip(whole_lse.data())) {
        assert_close(*got, f64::from(*expected), 1.0);
    }
}

#[test]
fn wrong_shapes_are_named() {
    let mut out = Matrix::zeros(2, 3);
    let w = weight(&Matrix::zeros(3, 5));
    let error = cpu().linear(2, &Matrix::zeros(2, 4), &w, None, false, &mut out).expect_err("4 is not 5");
    assert_eq!(error.to_string(), "linear: expected x of at least 2 rows, 5 columns, got [2, 4]");
}
