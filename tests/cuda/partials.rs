//! Merging partial attention results by their log-sum-exps.

use apbd::backend::cuda::{Cuda, CudaScores};
use apbd::backend::{Backend, HeadShape};

use super::Test;
use super::values::{Steps, Values, judge, poisoned};

pub const TESTS: &[Test] = &[("merge_of_two", two), ("merge_of_a_stack", stack)];

const SHAPE: HeadShape = HeadShape { heads: 3, kv_heads: 1, head_dim: 24 };

fn scores(cuda: &Cuda, values: &Values) -> CudaScores {
    let mut scores = cuda.scores(values.rows, values.cols).unwrap();
    let data: Vec<f32> = values.data.iter().map(|value| *value as f32).collect();
    cuda.set_scores(&data, &mut scores).unwrap();
    scores
}

/// Log-sum-exps of which some are of a side that saw nothing.
fn sums(seed: u64, rows: usize) -> Values {
    let random = Values::random(seed, rows, SHAPE.heads, 8.0);
    Values::from_fn(rows, SHAPE.heads, |i, j| match (i * 7 + j * 3 + seed as usize) % 5 {
        0 => f64::NEG_INFINITY,
        _ => random.at(i, j),
    })
}

/// `out` and the LSE of row `i`, head `j` over the parts.
fn merged(parts: &[(&Values, &Values, usize)], row: usize, col: usize, steps: Steps) -> (f64, f64) {
    let head = col / SHAPE.head_dim;
    let lse = |part: &(&Values, &Values, usize)| part.1.at(part.2 + row, head);
    let most = parts.iter().map(lse).fold(f64::NEG_INFINITY, f64::max);
    if most == f64::NEG_INFINITY {
        return (0.0, most);
    }
    let sum: f64 = parts.iter().map(|part| (lse(part) - most).exp()).sum();
    let value: f64 =
        parts.iter().map(|part| steps.of((lse(part) - most).exp() / sum) * part.0.at(part.2 + row, col)).sum();
    (steps.of(value), most + sum.ln())
}

fn two(cuda: &Cuda) {
    let (rows, first, part_first) = (9, 2, 4);
    let (out, part) = (Values::random(1, 12, SHAPE.q_width(), 1.0), Values::random(2, 14, SHAPE.q_width(), 1.0));
    let (lse, part_lse) = (sums(0, 12), sums(1, 14));
    let (mut device, mut device_lse) = (out.matrix(cuda), scores(cuda, &lse));
    let (from, from_lse) = (part.matrix(cuda), scores(cuda, &part_lse));
    cuda.merge(SHAPE, first..first + rows, &mut device, &mut device_lse, &from, &from_lse, part_first).unwrap();
    let got = Values::read(cuda, &device, 12, SHAPE.q_width());
    let inside = |row: usize| (first..first + rows).contains(&row);
    let parts = [(&out, &lse, first), (&part, &part_lse, part_first)];
    let of = |steps| {
        Values::from_fn(12, SHAPE.q_width(), |i, j| {
            if inside(i) { merged(&parts, i - first, j, steps).0 } else { out.at(i, j) }
        })
    };
    judge("merge", &got, of, 1e-4);
    let got = Values::read_scores(cuda, &device_lse, 12, SHAPE.heads);
    for i in 0..12 {
        for j in 0..SHAPE.heads {
            let expected =
                if inside(i) { merged(&parts, i - first, j * SHAPE.head_dim, Steps::Exact).1 } else { lse.at(i, j) };
            assert!(got.at(i, j) == expected || (got.at(i, j) - expected).abs() < 1e-4, "row {i}, head {j}");
        }
    }
}

fn stack(cuda: &Cuda) {
    for (rows, count) in [(1, 1), (1, 8), (5, 3), (70, 8)] {
        let parts = Values::random(5, rows * count, SHAPE.q_width(), 1.0);
        let lse = sums(rows as u64, rows * count);
        let mut out = poisoned(cuda, rows, SHAPE.q_width());
        cuda.merge_stacked(SHAPE, rows, count, &parts.matrix(cuda), &scores(cuda, &lse), &mut out).unwrap();
        let stacked: Vec<_> = (0..count).map(|part| (&parts, &lse, part * rows)).collect();
        let of = |steps| Values::from_fn(rows, SHAPE.q_width(), |i, j| merged(&stacked, i, j, steps).0);
        judge(&format!("{count} parts of {rows} rows"), &Values::read(cuda, &out, rows, SHAPE.q_width()), of, 1e-4);
    }
}
