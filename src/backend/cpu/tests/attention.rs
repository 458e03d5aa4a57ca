//! Attention, in one piece and in parts.

use proptest::prelude::*;

use super::*;

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

/// Tasks of consecutive queries over random segments of two sources.
fn any_tasks(source_rows: [usize; 2]) -> impl Strategy<Value = Vec<AttentionTask>> {
    let segment = (0..2_usize, 0.0..1.0_f64, 0.0..1.0_f64, any::<bool>()).prop_map(move |(source, a, b, causal)| {
        let place = |share: f64| (share * (source_rows[source] + 1) as f64) as usize;
        let (start, end) = (place(a.min(b)), place(a.max(b)));
        Segment { source, rows: start..end, mask: if causal { Mask::Causal } else { Mask::Full } }
    });
    let task = (0..3_usize, 1..90_usize, prop::collection::vec(segment, 0..4));
    prop::collection::vec(task, 1..4).prop_map(|tasks| {
        let mut row = 0;
        let mut placed = Vec::new();
        for (gap, count, segments) in tasks {
            placed.push(AttentionTask { queries: row + gap..row + gap + count, segments });
            row += gap + count;
        }
        placed
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn attention_is_what_its_definition_says(
        tasks in any_tasks([700, 40]), group in 0..3_usize, kv_heads in 1..3_usize, head_dim in 1..20_usize, seed: u64,
    ) {
        let shape = HeadShape { heads: kv_heads << group, kv_heads, head_dim };
        assert_attention(shape, &[700, 40], &tasks, seed % 2 == 0, seed);
    }

    #[test]
    fn segments_are_as_good_as_their_concatenation(
        cuts in prop::collection::vec(0..900_usize, 0..4), queries in 1..200_usize, seed: u64,
    ) {
        let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 16 };
        let (rng, keys) = (&mut StdRng::seed_from_u64(seed), 900);
        let q = random(rng, queries, shape.q_width());
        let (k, v) = (random(rng, keys, shape.kv_width()), random(rng, keys, shape.kv_width()));
        let mut cuts = cuts;
        cuts.extend([0, keys]);
        cuts.sort_unstable();
        let parts = cuts.windows(2).map(|cut| segment(0, cut[0]..cut[1], Mask::Full)).collect();
        let run = |segments| {
            let (mut out, mut lse) = (poisoned(queries, shape.q_width()), poisoned_scores(queries, shape.heads));
            let task = AttentionTask { queries: 0..queries, segments };
            cpu().attention(shape, &q, &[KvRef { k: &k, v: &v }], &[task], &mut out, Some(&mut lse)).expect("fits");
            (out, lse)
        };
        let ((out, lse), (whole, whole_lse)) = (run(parts), run(vec![segment(0, 0..keys, Mask::Full)]));
        for (got, expected) in out.data().iter().zip(whole.data()).chain(lse.data().iter().zip(whole_lse.data())) {
            assert_close(*got, f64::from(*expected), 1.0);
        }
    }
}

#[test]
fn attention_of_a_long_input_is_cut_by_queries_alone() {
    let shape = HeadShape { heads: 4, kv_heads: 1, head_dim: 8 };
    let tasks = [
        AttentionTask { queries: 0..150, segments: vec![segment(0, 0..150, Mask::Causal)] },
        AttentionTask {
            queries: 150..1150,
            segments: vec![segment(1, 0..77, Mask::Full), segment(0, 150..1150, Mask::Causal)],
        },
    ];
    assert_attention(shape, &[1150, 77], &tasks, true, 15);
}

#[test]
fn scores_of_hundreds_neither_overflow_nor_vanish() {
    let (rng, shape) = (&mut StdRng::seed_from_u64(16), HeadShape { heads: 2, kv_heads: 1, head_dim: 4 });
    let (mut q, k, v) = (random(rng, 30, 8), random(rng, 600, 4), random(rng, 600, 4));
    q.data_mut().iter_mut().for_each(|x| *x *= 400.0);
    let task = AttentionTask { queries: 0..30, segments: vec![segment(0, 0..600, Mask::Causal)] };
    let (mut out, mut lse) = (poisoned(30, 8), poisoned_scores(30, 2));
    let sources = [KvRef { k: &k, v: &v }];
    cpu().attention(shape, &q, &sources, std::slice::from_ref(&task), &mut out, Some(&mut lse)).expect("fits");
    let kv = [(k.clone(), v.clone())];
    for row in 0..30 {
        for head in 0..2 {
            let (expected, expected_lse) = attention_by_definition(shape, &q, &kv, &task, row, head);
            // A score of 800 in f32 is off by some 1e-4, and the weights with it.
            assert!((f64::from(lse.row(row)[head]) - expected_lse).abs() < 1e-3);
            for (got, expected) in out.row(row)[head * 4..].iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-3, "{got}, not {expected}");
            }
        }
    }
}

#[test]
fn a_key_that_is_not_a_number_shows_in_the_output() {
    let (rng, shape) = (&mut StdRng::seed_from_u64(17), HeadShape { heads: 2, kv_heads: 1, head_dim: 8 });
    for queries in [1, 40] {
        let (q, mut k, v) = (random(rng, queries, 16), random(rng, 300, 8), random(rng, 300, 8));
        k.row_mut(123)[5] = f32::NAN;
        let task = AttentionTask { queries: 0..queries, segments: vec![segment(0, 0..300, Mask::Full)] };
        let mut out = Matrix::zeros(queries, 16);
        cpu().attention(shape, &q, &[KvRef { k: &k, v: &v }], &[task], &mut out, None).expect("fits");
        assert!(out.data().iter().all(|x| x.is_nan()));
    }
}

#[test]
fn impossible_tasks_are_refused() {
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 4 };
    let (q, kv) = (Matrix::zeros(6, 8), Matrix::zeros(9, 4));
    let task = |queries: Range<usize>, source, rows| AttentionTask {
        queries,
        segments: vec![segment(source, rows, Mask::Full)],
    };
    for tasks in [
        vec![task(0..4, 0, 0..9), task(3..6, 0, 0..9)],
        vec![task(0..7, 0, 0..9)],
        vec![task(0..6, 0, 0..10)],
        vec![task(0..6, 1, 0..9)],
    ] {
        let sources = [KvRef { k: &kv, v: &kv }];
        let outcome = cpu().attention(shape, &q, &sources, &tasks, &mut Matrix::zeros(6, 8), None);
        assert!(matches!(outcome, Err(BackendError::Shape { op: "attention", .. })), "{tasks:?}");
    }
}

#[test]
fn merging_takes_nothing_from_a_side_that_saw_nothing() {
    let shape = HeadShape { heads: 2, kv_heads: 1, head_dim: 2 };
    let nothing = f32::NEG_INFINITY;
    let mut out = Matrix::from_vec(2, 4, vec![POISON, POISON, 1.0, 2.0, POISON, POISON, 3.0, 4.0]);
    let mut lse = Scores::from_vec(2, 2, vec![nothing, 0.5, nothing, 0.0]);
    let part = Matrix::from_vec(3, 4, vec![9.0, 9.0, 9.0, 9.0, 5.0, 6.0, POISON, POISON, POISON, POISON, 7.0, 8.0]);
    let part_lse = Scores::from_vec(3, 2, vec![9.0, 9.0, 1.5, nothing, nothing, 0.0]);
    cpu().merge(shape, 0..2, &mut out, &mut lse, &part, &part_lse, 1).expect("fits");
    assert_eq!(out.data(), [5.0, 6.0, 1.0, 2.0, 0.0, 0.0, 5.0, 6.0]);
    assert_eq!(lse.data()[..3], [1.5, 0.5, nothing]);
    assert_close(lse.data()[3], 2.0_f64.ln(), 1.0);
}
