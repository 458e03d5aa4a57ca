//! What a layer does to each row: embedding, norm, products, MLP, RoPE.

use std::ops::Range;

use apbd::backend::cuda::Cuda;
use apbd::backend::{Backend, HeadShape, KvMut};

use super::Test;
use super::values::{Steps, Values, judge, poisoned, product};

pub const TESTS: &[Test] = &[
    ("embedding_is_a_copy", embedding),
    ("rms_norm", rms_norm),
    ("linear_layers", linear),
    ("mlp", mlp),
    ("parts_of_an_mlp_add_up_to_it", parts_of_an_mlp),
    ("rope_rotates_and_stores", rope),
    ("copied_rows_are_the_same", copies),
];

fn embedding(cuda: &Cuda) {
    for cols in [8, 264, 4096] {
        let table = Values::random(1, 50, cols, 1.0);
        let ids = [49u32, 0, 7, 7, 31];
        let mut out = poisoned(cuda, 6, cols);
        cuda.embed(&table.weight(cuda), &ids, &mut out).unwrap();
        let got = Values::read(cuda, &out, 6, cols);
        for (row, id) in ids.iter().enumerate() {
            assert_eq!(got.row(row), table.row(*id as usize));
        }
        assert!(got.row(5).iter().all(|value| value.is_nan()));
    }
}

pub fn norm_of(x: &Values, w: &Values, epsilon: f64, steps: Steps) -> Values {
    Values::from_fn(x.rows, x.cols, |i, j| {
        let mean = x.row(i).iter().map(|value| value * value).sum::<f64>() / x.cols as f64;
        steps.of(steps.of(x.at(i, j) / (mean + epsilon).sqrt()) * w.at(0, j))
    })
}

fn rms_norm(cuda: &Cuda) {
    for (rows, cols) in [(1, 8), (3, 72), (5, 2048), (2, 4096), (3, 5120), (2, 7168), (1, 32768)] {
        let (x, w) = (Values::random(1, rows + 1, cols, 3.0), Values::random(2, 1, cols, 1.0));
        let mut out = poisoned(cuda, rows + 1, cols);
        cuda.rms_norm(rows, &x.matrix(cuda), &w.weight(cuda), 1e-5, &mut out).unwrap();
        let got = Values::read(cuda, &out, rows + 1, cols);
        judge(&format!("[{rows}, {cols}]"), &got.first(rows), |steps| norm_of(&x.first(rows), &w, 1e-5, steps), 1e-4);
        assert!(got.row(rows).iter().all(|value| value.is_nan()));
    }
}

fn linear(cuda: &Cuda) {
    for rows in [1, 2, 3, 8, 17, 32, 64, 129] {
        for (width, inner) in [(8, 8), (24, 264), (136, 1032), (512, 256)] {
            for (bias, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
                let (x, w) = (Values::random(1, rows, inner, 1.0), Values::random(2, width, inner, 0.2));
                let (b, before) = (Values::random(3, 1, width, 1.0), Values::random(4, rows, width, 1.0));
                let mut out = if accumulate { before.matrix(cuda) } else { poisoned(cuda, rows, width) };
                let weight = b.weight(cuda);
                cuda.linear(rows, &x.matrix(cuda), &w.weight(cuda), bias.then_some(&weight), accumulate, &mut out)
                    .unwrap();
                let of = |steps: Steps| {
                    let sum = product(&x, &w, steps);
                    Values::from_fn(rows, width, |i, j| {
                        let with_bias = steps.of(sum.at(i, j) + if bias { b.at(0, j) } else { 0.0 });
                        steps.of(with_bias + if accumulate { before.at(i, j) } else { 0.0 })
                    })
                };
                let case = format!("[{rows}, {inner}] x [{width}, {inner}], bias {bias}, accumulate {accumulate}");
                judge(&case, &Values::read(cuda, &out, rows, width), of, 1e-3);
            }
        }
    }
}

/// `h` through columns `part` of an MLP's width, without the residual.
fn through_mlp(h: &Values, (gate_up, down): (&Values, &Values), part: Range<usize>, steps: Steps) -> Values {
    let (both, width) = (product(h, gate_up, steps), down.cols);
    let inner = Values::from_fn(h.rows, width, |i, j| {
        let gate = both.at(i, j);
        let is_part = if part.contains(&j) { 1.0 } else { 0.0 };
        is_part * steps.of(steps.of(gate / (1.0 + (-gate).exp())) * both.at(i, width + j))
    });
    product(&inner, down, steps)
}

fn mlp(cuda: &Cuda) {
    for (rows, hidden, width) in
        [(1, 64, 136), (2, 64, 136), (11, 72, 24), (32, 64, 136), (33, 128, 264), (4099, 32, 24)]
    {
        let (h, x) = (Values::random(1, rows, hidden, 1.0), Values::random(2, rows, hidden, 1.0));
        let (gate_up, down) = (Values::random(3, 2 * width, hidden, 0.3), Values::random(4, hidden, width, 0.3));
        let mut out = x.matrix(cuda);
        let weights = (gate_up.weight(cuda), down.weight(cuda));
        cuda.mlp(rows, &h.matrix(cuda), &weights.0, &weights.1, &mut out).unwrap();
        let of = |steps: Steps| {
            let back = through_mlp(&h, (&gate_up, &down), 0..width, steps);
            Values::from_fn(rows, hidden, |i, j| steps.of(x.at(i, j) + back.at(i, j)))
        };
        judge(&format!("{rows} rows"), &Values::read(cuda, &out, rows, hidden), of, 1e-3);
    }
}

/// Parts of one and of many pieces, at both ends and in the middle, and none; then all of them added up.
fn parts_of_an_mlp(cuda: &Cuda) {
    for (rows, hidden, width) in [(1, 64, 136), (11, 72, 24), (32, 64, 136), (33, 128, 264), (4099, 32, 24)] {
        let (h, x) = (Values::random(1, rows, hidden, 1.0), Values::random(2, rows, hidden, 1.0));
        let (gate_up, down) = (Values::random(3, 2 * width, hidden, 0.3), Values::random(4, hidden, width, 0.3));
        let weights = (gate_up.weight(cuda), down.weight(cuda));
        let parts = [0..8, 8..8, 8..width - 8, width - 8..width];
        let mut partials = cuda.scores(parts.len() * rows + 1, hidden).unwrap();
        let spare = vec![7.0; (parts.len() * rows + 1) * hidden];
        cuda.set_scores(&spare, &mut partials).unwrap();
        for (index, part) in parts.iter().enumerate() {
            let (h, first) = (h.matrix(cuda), index * rows);
            cuda.mlp_part(rows, &h, &weights.0, &weights.1, part.clone(), &mut partials, first).unwrap();
        }
        let got = cuda.read_scores(&partials).unwrap();
        for (index, part) in parts.iter().enumerate() {
            let first = index * rows * hidden;
            let got = Values::from_fn(rows, hidden, |i, j| f64::from(got[first + i * hidden + j]));
            let of = |steps: Steps| through_mlp(&h, (&gate_up, &down), part.clone(), steps);
            judge(&format!("{rows} rows, {part:?}"), &got, of, 1e-3);
        }
        assert!(got[parts.len() * rows * hidden..].iter().all(|value| *value == 7.0), "a row beyond was touched");
        let mut out = x.matrix(cuda);
        cuda.add_partials(rows, parts.len(), &partials, &mut out).unwrap();
        let of = |steps: Steps| {
            let sum = |i: usize, j: usize| -> f64 {
                (0..parts.len()).map(|part| f64::from(got[((part * rows) + i) * hidden + j])).sum()
            };
            Values::from_fn(rows, hidden, |i, j| steps.of(x.at(i, j) + sum(i, j)))
        };
        judge(&format!("{rows} rows, added up"), &Values::read(cuda, &out, rows, hidden), of, 1e-3);
        let refused = |part: Range<usize>, partials: &mut _| {
            cuda.mlp_part(rows, &h.matrix(cuda), &weights.0, &weights.1, part, partials, 0).is_err()
        };
        assert!(refused(0..width + 8, &mut partials) && refused(4..width, &mut partials), "no part of the width");
    }
}

fn rope(cuda: &Cuda) {
    for (heads, kv_heads, head_dim) in [(2, 1, 16), (4, 2, 64), (3, 3, 128)] {
        let shape = HeadShape { heads, kv_heads, head_dim };
        let half = head_dim / 2;
        let inv_freq: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
        let scale = 1.25f32;
        let positions = [0u32, 1, 2, 5, 6, 1_000_000, 1_000_001, 3];
        let (first, rows) = (2, positions.len());
        let qkv = Values::random(1, first + rows + 1, shape.qkv_width(), 1.0);
        let mut device = qkv.matrix(cuda);
        let (mut k, mut v) = (poisoned(cuda, rows + 4, shape.kv_width()), poisoned(cuda, rows + 4, shape.kv_width()));
        let kv = KvMut { k: &mut k, v: &mut v, first_row: 3 };
        cuda.rope_store(shape, first..first + rows, &positions, &inv_freq, scale, &mut device, kv).unwrap();
        let got = Values::read(cuda, &device, qkv.rows, qkv.cols);
        let of = |steps: Steps| {
            Values::from_fn(qkv.rows, qkv.cols, |row, col| {
                let (head, d) = (col / head_dim, col % head_dim);
                if row < first || row >= first + rows || head >= heads + kv_heads {
                    return qkv.at(row, col);
                }
                let angle = f64::from(positions[row - first]) * f64::from(inv_freq[d % half]);
                let (sine, cosine) =
                    (steps.of(angle.sin() * f64::from(scale)), steps.of(angle.cos() * f64::from(scale)));
                let (a, b) = (qkv.at(row, head * head_dim + d % half), qkv.at(row, head * head_dim + d % half + half));
                steps.of(if d < half {
                    steps.of(a * cosine) - steps.of(b * sine)
                } else {
                    steps.of(b * cosine) + steps.of(a * sine)
                })
            })
        };
        judge(&format!("{shape:?}"), &got, of, 1e-4);
        let (k, v) =
            (Values::read(cuda, &k, rows + 4, shape.kv_width()), Values::read(cuda, &v, rows + 4, shape.kv_width()));
        for row in 0..rows + 4 {
            if (3..3 + rows).contains(&row) {
                let from = got.row(first + row - 3);
                assert_eq!(k.row(row), &from[shape.q_width()..shape.q_width() + shape.kv_width()]);
                assert_eq!(v.row(row), &from[shape.q_width() + shape.kv_width()..]);
            } else {
                assert!(k.row(row).iter().chain(v.row(row)).all(|value| value.is_nan()));
            }
        }
    }
}

fn copies(cuda: &Cuda) {
    let from = Values::random(1, 9, 40, 1.0);
    let mut to = poisoned(cuda, 7, 40);
    cuda.copy_rows(&from.matrix(cuda), 4, 5, &mut to, 1).unwrap();
    let got = Values::read(cuda, &to, 7, 40);
    assert_eq!(&got.data[40..240], &from.data[160..360]);
    assert!(got.row(0).iter().chain(got.row(6)).all(|value| value.is_nan()));
}
