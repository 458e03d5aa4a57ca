//! The language-model head: logits of the whole vocabulary and of parts of it, and the choice of tokens.

use apbd::backend::cuda::{Cuda, CudaMatrix, CudaScores, CudaWeight};
use apbd::backend::{Backend, Head, Next, Wanted, even_part};

use super::Test;
use super::layers::norm_of;
use super::values::{Steps, Values, judge, poisoned, poisoned_scores, product, rounded};

pub const TESTS: &[Test] = &[
    ("logits_of_a_part_of_the_vocabulary", part_of_logits),
    ("logits_of_all_parts_are_those_of_the_whole", joined),
    ("the_likeliest_token_is_the_first_of_the_highest", likeliest),
    ("draws_hit_every_token_of_the_nucleus_and_no_other", draws),
    ("next_tokens_are_those_of_each_row_alone", next_tokens),
];

/// Logits of the first `rows` rows.
fn logits(cuda: &Cuda, rows: usize, x: &CudaMatrix, head: &Head<'_, CudaWeight>) -> CudaScores {
    let vocab = head.weights.rows();
    let mut out = poisoned_scores(cuda, rows, vocab);
    cuda.logits(rows, x, head, 0..vocab, &mut out, 0).unwrap();
    out
}

fn read_row(cuda: &Cuda, scores: &CudaScores, row: usize) -> Vec<f32> {
    let (all, cols) = (cuda.read_scores(scores).unwrap(), scores.cols());
    all[row * cols..(row + 1) * cols].to_vec()
}

/// The token that is chosen of the first row; nothing if its logits come instead.
fn chosen(cuda: &Cuda, x: &CudaMatrix, head: &Head<'_, CudaWeight>, choice: (f32, f32, f32)) -> Option<u32> {
    match cuda.next_tokens(&logits(cuda, 1, x, head), &[Wanted::Token(choice)]).unwrap()[..] {
        [Next::Token(token)] => Some(token),
        _ => None,
    }
}

/// A row by itself.
fn row_of(cuda: &Cuda, x: &CudaMatrix, row: usize) -> CudaMatrix {
    let mut alone = poisoned(cuda, 1, x.cols());
    cuda.copy_rows(x, row, 1, &mut alone, 0).unwrap();
    alone
}

fn part_of_logits(cuda: &Cuda) {
    let (vocab, cols) = (333, 136);
    for (rows, part) in [(1, 0..333), (3, 7..333), (32, 40..41), (33, 0..80), (70, 80..333)] {
        let (x, norm, weights) =
            (Values::random(1, rows, cols, 2.0), Values::random(2, 1, cols, 1.0), Values::random(3, vocab, cols, 0.3));
        let (x_there, norm_there, weights_there) = (x.matrix(cuda), norm.weight(cuda), weights.weight(cuda));
        let head = Head { norm: &norm_there, epsilon: 1e-6, weights: &weights_there };
        let (width, mut out) = (part.len(), poisoned_scores(cuda, rows + 2, part.len()));
        cuda.logits(rows, &x_there, &head, part.clone(), &mut out, 1).unwrap();
        let all = Values::read_scores(cuda, &out, rows + 2, width);
        assert!(all.row(0).iter().chain(all.row(rows + 1)).all(|logit| logit.is_nan()), "rows beside were touched");
        let got = Values::from_fn(rows, width, |i, j| all.at(i + 1, j));
        // The normed row is in bf16 either way; sums stay in f32.
        let normed = norm_of(&x, &norm, 1e-6, Steps::Exact);
        let normed = Values::from_fn(rows, cols, |i, j| rounded(normed.at(i, j)));
        let weights = Values::from_fn(width, cols, |i, j| weights.at(part.start + i, j));
        judge(&format!("{rows} rows, {part:?}"), &got, |steps| product(&normed, &weights, steps), 1e-4);
        assert!(cuda.logits(rows, &x_there, &head, vocab + 1 - width..vocab + 1, &mut out, 0).is_err());
    }
}

fn joined(cuda: &Cuda) {
    let cols = 72;
    for (vocab, count, rows) in [(333, 2, 1), (333, 8, 5), (48, 3, 3), (5, 4, 2), (1, 8, 1), (2048, 2, 32)] {
        let (x, norm) = (Values::random(1, rows, cols, 2.0).matrix(cuda), Values::random(2, 1, cols, 1.0).weight(cuda));
        let weights = Values::random(3, vocab, cols, 0.3).weight(cuda);
        let head = Head { norm: &norm, epsilon: 1e-6, weights: &weights };
        let whole = cuda.read_scores(&logits(cuda, rows, &x, &head)).unwrap();
        let mut parts = poisoned_scores(cuda, count * rows, even_part(vocab, 0, count).len());
        for part in 0..count {
            cuda.logits(rows, &x, &head, even_part(vocab, part, count), &mut parts, part * rows).unwrap();
        }
        let mut out = poisoned_scores(cuda, rows + 1, vocab);
        cuda.join_columns(rows, count, &parts, &mut out).unwrap();
        let got = cuda.read_scores(&out).unwrap();
        assert!(got[..rows * vocab] == whole, "{count} parts of {vocab} tokens, {rows} rows");
        assert!(got[rows * vocab..].iter().all(|logit| logit.is_nan()));
        assert!(cuda.join_columns(rows + 1, count, &parts, &mut out).is_err(), "more rows than there are");
    }
}

const LIKELIEST: (f32, f32, f32) = (0.0, 1.0, 0.0);

fn likeliest(cuda: &Cuda) {
    let cols = 64;
    let unit = |at: usize| Values::from_fn(1, cols, |_, j| if j == at { 1.0 } else { 0.0 });
    let (x, norm) = (unit(0).matrix(cuda), Values::from_fn(1, cols, |_, _| 1.0).weight(cuda));
    for vocab in [1, 31, 1000, 5000] {
        // The logit of a token is its first weight, times what the norm makes of the row.
        for levels in [2.0, 1000.0] {
            let random = Values::random(vocab as u64, vocab, cols, 1.0);
            let head = Values::from_fn(vocab, cols, |i, j| (random.at(i, j) * levels).round() / 8.0);
            let weight = head.weight(cuda);
            let head = Head { norm: &norm, epsilon: 1e-6, weights: &weight };
            let logits = read_row(cuda, &logits(cuda, 1, &x, &head), 0);
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = logits.iter().position(|logit| *logit == highest).unwrap();
            assert_eq!(chosen(cuda, &x, &head, LIKELIEST), Some(expected as u32), "{vocab} tokens");
        }
    }
    // A norm that overflows makes logits that are not finite.
    let huge = Values::from_fn(1, cols, |_, _| 3e38).weight(cuda);
    let weights = Values::from_fn(9, cols, |i, _| if i == 4 { 3e38 } else { 1e-38 }).weight(cuda);
    let head = Head { norm: &huge, epsilon: 1e-6, weights: &weights };
    for choice in [LIKELIEST, (0.7, 0.9, 0.5)] {
        assert_eq!(chosen(cuda, &x, &head, choice), None);
    }
}

fn draws(cuda: &Cuda) {
    let cols = 64;
    let x = Values::from_fn(1, cols, |_, j| if j == 0 { 1.0 } else { 0.0 }).matrix(cuda);
    let norm = Values::from_fn(1, cols, |_, _| 1.0).weight(cuda);
    for (vocab, temperature, top_p) in
        [(1, 1.0, 0.5), (40, 1.0, 1.0), (40, 4.0, 0.61), (3000, 0.6, 0.9), (3000, 0.1, 0.3)]
    {
        let random = Values::random(vocab as u64, vocab, cols, 1.0);
        // Some logits are equal.
        let weights = Values::from_fn(vocab, cols, |i, j| (random.at(i, j) * 16.0).round() / 8.0).weight(cuda);
        let head = Head { norm: &norm, epsilon: 1e-6, weights: &weights };
        let logits = read_row(cuda, &logits(cuda, 1, &x, &head), 0);
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f64> =
            logits.iter().map(|logit| (f64::from(logit - highest) / f64::from(temperature)).exp()).collect();
        let mut sorted = weights.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let mut held = 0.0;
        let enough = weights.iter().sum::<f64>() * f64::from(top_p);
        let least = *sorted
            .iter()
            .find(|weight| {
                held += **weight;
                held >= enough * (1.0 - 1e-9)
            })
            .unwrap();
        let nucleus = |weight: f64| if weight >= least { weight } else { 0.0 };
        let total: f64 = weights.iter().map(|weight| nucleus(*weight)).sum();
        // Every few tokens, the middle of its share, if that is wide enough for sums in f32.
        let wide = |weight: &f64| nucleus(*weight) / total > 1e-4;
        let step = weights.iter().filter(|weight| wide(weight)).count().div_ceil(5);
        let (mut before, mut seen) = (0.0, 0);
        for (token, weight) in weights.iter().enumerate() {
            if wide(weight) {
                if seen % step == 0 {
                    let choice = (temperature, top_p, ((before + weight / 2.0) / total) as f32);
                    assert_eq!(chosen(cuda, &x, &head, choice), Some(token as u32), "{vocab} tokens, {choice:?}");
                }
                seen += 1;
            }
            before += nucleus(*weight);
        }
    }
}

fn next_tokens(cuda: &Cuda) {
    let (vocab, cols) = (333, 136);
    let (norm, weights) =
        (Values::random(2, 1, cols, 1.0).weight(cuda), Values::random(3, vocab, cols, 0.3).weight(cuda));
    let head = Head { norm: &norm, epsilon: 1e-6, weights: &weights };
    for rows in [1, 3, 33, 70] {
        let mut x = Values::random(1, rows, cols, 2.0);
        // One row's logits are not finite.
        if rows > 3 {
            x.data[2 * cols + 5] = f64::INFINITY;
        }
        let x = x.matrix(cuda);
        let wanted = |row: usize| match row % 3 {
            0 => Wanted::Token(LIKELIEST),
            1 => Wanted::Token((0.8, 0.9, row as f32 / 70.0)),
            _ => Wanted::Logits,
        };
        let all: Vec<_> = (0..rows).map(wanted).collect();
        let got = cuda.next_tokens(&logits(cuda, rows, &x, &head), &all).unwrap();
        assert_eq!(got.len(), rows);
        for (row, (got, wanted)) in got.iter().zip(&all).enumerate() {
            let x = row_of(cuda, &x, row);
            let alone = || read_row(cuda, &logits(cuda, 1, &x, &head), 0);
            match (got, wanted) {
                (Next::Token(token), Wanted::Token(choice)) if rows <= 32 => {
                    assert_eq!(Some(*token), chosen(cuda, &x, &head, *choice), "row {row} of {rows}");
                }
                // More rows are cuBLASLt's, which adds in another order.
                (Next::Token(token), Wanted::Token((temperature, ..))) => {
                    let alone = alone();
                    let highest = alone.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert!(*temperature > 0.0 || alone[*token as usize] > highest - 1e-3, "row {row} of {rows}");
                }
                (Next::Logits(logits), Wanted::Logits) => {
                    let allowed = if rows <= 32 { 0.0 } else { 1e-3 };
                    let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= allowed || (!a.is_finite() && !b.is_finite());
                    assert!(logits.iter().zip(&alone()).all(is_near), "row {row} of {rows}");
                }
                _ => panic!("row {row} of {rows}: {wanted:?} gave {got:?}"),
            }
        }
    }
    let broken = Values::from_fn(1, cols, |_, _| f64::INFINITY).matrix(cuda);
    let got = cuda.next_tokens(&logits(cuda, 1, &broken, &head), &[Wanted::Token(LIKELIEST)]).unwrap();
    assert!(matches!(&got[..], [Next::Logits(logits)] if logits.iter().any(|logit| !logit.is_finite())));
    assert!(cuda.next_tokens(&logits(cuda, 1, &broken, &head), &[Wanted::Logits; 2]).is_err(), "one row of logits");
}
