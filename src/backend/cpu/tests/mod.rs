//! Every operation against a plain reference in f64, on odd sizes, with poisoned outputs.

mod attention;
mod layers;
mod positions;
mod selection;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::{DType, Mask, Segment};

/// What outputs hold before they are written.
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

/// A layer or so of odd sizes: every vectorised operation takes part.
fn some_layer(cpu: &Cpu, rows: usize) -> Matrix {
    let shape = HeadShape { heads: 4, kv_heads: 2, head_dim: 22 };
    let rng = &mut StdRng::seed_from_u64(1);
    let (mut x, mut h) = (random(rng, rows, 43), poisoned(rows, 43));
    cpu.rms_norm(rows, &x, &weight(&random(rng, 1, 43)), 1e-5, &mut h).expect("shapes");
    let mut qkv = poisoned(rows, shape.qkv_width());
    cpu.linear(rows, &h, &weight(&random(rng, shape.qkv_width(), 43)), None, false, &mut qkv).expect("shapes");
    let (k, v) = (random(rng, rows + 5, shape.kv_width()), random(rng, rows + 5, shape.kv_width()));
    let segments = vec![Segment { source: 0, rows: 0..rows + 5, mask: Mask::Causal }];
    let task = AttentionTask { queries: 0..rows, segments };
    let mut out = poisoned(rows, shape.q_width());
    cpu.attention(shape, &qkv, &[KvRef { k: &k, v: &v }], &[task], &mut out, None).expect("shapes");
    let (gate_up, down) = (weight(&random(rng, 2 * 70, shape.q_width())), weight(&random(rng, 43, 70)));
    cpu.mlp(rows, &out, &gate_up, &down, &mut x).expect("shapes");
    x
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for rows in [1, 40, 600, 2300] {
        let alone = some_layer(&Cpu::new(1).expect("threads"), rows);
        assert!(alone.data().iter().all(|x| x.is_finite()));
        for threads in [2, 4] {
            assert_eq!(some_layer(&Cpu::new(threads).expect("threads"), rows), alone, "{threads} threads, {rows} rows");
        }
    }
}

#[test]
fn results_are_the_same_on_every_instruction_set_but_for_rounding() {
    let alone = Cpu::new(1).expect("no threads");
    for rows in [1, 3, 40, 300] {
        let best = some_layer(&alone, rows);
        for set in vector::instruction_sets() {
            vector::FORCED.set(Some(set));
            let forced = some_layer(&alone, rows);
            vector::FORCED.set(None);
            for (got, expected) in forced.data().iter().zip(best.data()) {
                assert_close(*got, f64::from(*expected), 10.0);
            }
        }
    }
}
