//! Scores of tokens, the best of them with the tie rule, and their keys and values.

use std::ops::Range;

use apbd::backend::cuda::Cuda;
use apbd::backend::{Backend, HeadShape, KvMut, KvRef};

use super::Test;
use super::values::{Steps, Values, judge, poisoned, poisoned_scores, product};

pub const TESTS: &[Test] = &[
    ("retaining_head_scores", retaining),
    ("query_aware_scores", query_aware),
    ("top_k_breaks_ties_by_position", top_k),
    ("gathered_rows_are_those_chosen", gather),
];

fn retaining(cuda: &Cuda) {
    for (rows, width, inner, kv_heads) in [(1, 64, 48, 2), (37, 96, 264, 3), (4099, 32, 48, 8), (50, 1024, 256, 9)] {
        let (qkv, w1, w2) = (
            Values::random(1, rows, inner, 1.0),
            Values::random(2, width, inner, 0.2),
            Values::random(3, kv_heads, width, 0.2),
        );
        let mut out = poisoned_scores(cuda, kv_heads, rows + 5);
        cuda.retaining_scores(rows, &qkv.matrix(cuda), &w1.weight(cuda), &w2.weight(cuda), &mut out).unwrap();
        let got = Values::read_scores(cuda, &out, kv_heads, rows + 5);
        assert!((0..kv_heads).all(|head| got.row(head)[rows..].iter().all(|value| value.is_nan())));
        let of = |steps: Steps| {
            let hidden = product(&qkv, &w1, steps);
            let active =
                Values::from_fn(rows, width, |i, j| steps.of(hidden.at(i, j) / (1.0 + (-hidden.at(i, j)).exp())));
            product(&w2, &active, steps)
        };
        let got = Values::from_fn(kv_heads, rows, |i, j| got.at(i, j));
        judge(&format!("{rows} rows, width {width}"), &got, of, 1e-4);
    }
}

fn query_aware(cuda: &Cuda) {
    for (heads, kv_heads, head_dim) in [(4, 4, 16), (6, 2, 64), (4, 1, 128)] {
        let shape = HeadShape { heads, kv_heads, head_dim };
        let (q, k) = (Values::random(1, 12, shape.qkv_width(), 1.0), Values::random(2, 45, shape.kv_width(), 1.0));
        let (queries, rows) = (3..10, 41);
        let mut out = poisoned_scores(cuda, kv_heads, 45);
        cuda.query_aware_scores(shape, queries.clone(), &q.matrix(cuda), rows, &k.matrix(cuda), &mut out).unwrap();
        let of = |steps: Steps| {
            Values::from_fn(kv_heads, rows, |head, i| {
                let mut sum = 0.0;
                for query in queries.clone() {
                    for g in 0..shape.group() {
                        let from = (head * shape.group() + g) * head_dim;
                        let dot: f64 =
                            (0..head_dim).map(|d| q.at(query, from + d) * k.at(i, head * head_dim + d)).sum();
                        sum += steps.of(dot) / (head_dim as f64).sqrt();
                    }
                }
                steps.of(sum / (queries.len() * shape.group()) as f64)
            })
        };
        let got = Values::read_scores(cuda, &out, kv_heads, 45);
        judge(&format!("{shape:?}"), &Values::from_fn(kv_heads, rows, |i, j| got.at(i, j)), of, 1e-4);
    }
}

/// By definition: pooled over the sequence of both ranges, sorted by score and then by column.
fn best(
    scores: &[f32],
    before: Range<usize>,
    candidates: Range<usize>,
    excluded: usize,
    k: usize,
    pool: bool,
) -> Vec<i32> {
    let columns: Vec<usize> = before.clone().chain(candidates.clone()).collect();
    let pooled = |at: usize| {
        let reach = if pool { 2 } else { 0 };
        let window = at.saturating_sub(reach)..(at + reach + 1).min(columns.len());
        window.map(|i| scores[columns[i]]).fold(f32::NEG_INFINITY, f32::max)
    };
    let mut order: Vec<(f32, usize)> =
        (before.len() + excluded..columns.len()).map(|at| (pooled(at), columns[at])).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut chosen: Vec<i32> = order[..k].iter().map(|(_, column)| *column as i32).collect();
    chosen.sort_unstable();
    chosen
}

fn top_k(cuda: &Cuda) {
    let heads = 3;
    for (cols, before, candidates, excluded, k) in [
        (10, 0..0, 0..10, 0, 10),
        (40, 3..9, 12..40, 0, 7),
        (2000, 0..100, 500..2000, 0, 512),
        (3000, 0..0, 0..3000, 1000, 1),
        (5000, 0..64, 64..5000, 2, 4934),
        (70_000, 0..4096, 4096..70_000, 0, 2048),
    ] {
        for levels in [3, 50, 1 << 20] {
            let random = Values::random(cols as u64 + levels as u64, heads, cols, 1.0);
            // Few levels mean many ties; both zeros are among them.
            let data: Vec<f32> =
                random.data.iter().map(|value| (value * f64::from(levels)).round() as f32 / 8.0).collect();
            let mut scores = cuda.scores(heads, cols).unwrap();
            cuda.set_scores(&data, &mut scores).unwrap();
            for pool in [false, true] {
                let rows = cuda.top_k(&scores, before.clone(), candidates.clone(), excluded, k, pool).unwrap();
                let got = cuda.read_rows(&rows).unwrap();
                for head in 0..heads {
                    // -0 counts as 0.
                    let row: Vec<f32> = data[head * cols..(head + 1) * cols].iter().map(|value| value + 0.0).collect();
                    let expected = best(&row, before.clone(), candidates.clone(), excluded, k, pool);
                    assert!(
                        got[head * k..(head + 1) * k] == expected,
                        "{cols} columns, {k} of {candidates:?}, pool {pool}"
                    );
                }
            }
        }
    }
}

fn gather(cuda: &Cuda) {
    let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 24 };
    let (k, v) = (Values::random(1, 30, shape.kv_width(), 1.0), Values::random(2, 30, shape.kv_width(), 1.0));
    let data: Vec<f32> = Values::random(3, 2, 40, 1.0).data.iter().map(|value| *value as f32).collect();
    let mut scores = cuda.scores(2, 40).unwrap();
    cuda.set_scores(&data, &mut scores).unwrap();
    let rows = cuda.top_k(&scores, 0..10, 10..40, 0, 9, true).unwrap();
    let chosen = cuda.read_rows(&rows).unwrap();
    let (mut to_k, mut to_v) = (poisoned(cuda, 12, shape.kv_width()), poisoned(cuda, 12, shape.kv_width()));
    let (from_k, from_v) = (k.matrix(cuda), v.matrix(cuda));
    let to = KvMut { k: &mut to_k, v: &mut to_v, first_row: 2 };
    cuda.gather_kv(shape, &rows, 10, KvRef { k: &from_k, v: &from_v }, to).unwrap();
    for (from, to) in [(&k, &to_k), (&v, &to_v)] {
        let got = Values::read(cuda, to, 12, shape.kv_width());
        for i in 0..9 {
            for col in 0..shape.kv_width() {
                let row = chosen[col / shape.head_dim * 9 + i] as usize - 10;
                assert_eq!(got.at(2 + i, col), from.at(row, col));
            }
        }
        assert!(got.row(0).iter().chain(got.row(1)).chain(got.row(11)).all(|value| value.is_nan()));
    }
}
