//! Scores, and the choice by them.

use proptest::prelude::*;

use super::*;

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
