//! How much of the processor the CPU backend gets: attention and linear layers in GFLOP/s, as a share of what the `gemm` crate gets
//! from a plain product of as many operations in the same run, and the time of a small model's prefill.
//!
//! `cargo bench --bench cpu_attention [-- THREADS] [attention | decode | linear | prefill]`

#![allow(unsafe_code)]

use std::time::Instant;

use apbd::backend::cpu::{Cpu, Matrix, Weight};
use apbd::backend::{AttentionTask, Backend, DType, HeadShape, KvMut, KvRef, Mask, Segment, WeightView};

const SHAPE: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
const HIDDEN: usize = 256;
const MLP: usize = 768;
const LAYERS: usize = 8;

fn main() {
    let (mut threads, mut only) = (std::thread::available_parallelism().map_or(1, usize::from), None);
    for arg in std::env::args().skip(1).filter(|arg| !arg.starts_with("--")) {
        match arg.parse() {
            Ok(number) => threads = number,
            Err(_) => only = Some(arg),
        }
    }
    let cpu = Cpu::new(threads).expect("threads");
    println!("{threads} threads");
    let wanted = |what: &str| only.as_deref().is_none_or(|only| only == what);
    if wanted("attention") {
        [1024, 8192, 32768].into_iter().for_each(|tokens| attention(&cpu, threads, tokens));
    }
    if wanted("decode") {
        attention_of_one(&cpu, 32768);
        linear_of_one(&cpu, (4096, 14336));
    }
    if wanted("linear") {
        for sizes in
            [(8192, HIDDEN, 512), (8192, HIDDEN, 2 * MLP), (16, 4096, 4096), (64, 4096, 4096), (64, HIDDEN, 512)]
        {
            linear(&cpu, threads, sizes);
        }
        mlp(&cpu, threads, 8192);
    }
    if wanted("prefill") {
        prefill_layers(&cpu, 32768);
    }
}

/// Seconds of the fastest of a few runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let once = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let first = once(&mut run);
    let again = (1.0 / first.max(1e-6)).clamp(2.0, 200.0) as usize;
    (0..again).map(|_| once(&mut run)).fold(first, f64::min)
}

fn report(what: &str, threads: usize, operations: f64, seconds: f64) {
    let plain = plain_product(threads, operations);
    let rate = operations / seconds / 1e9;
    println!(
        "{what:<44} {:9.3} ms {rate:8.1} GFLOP/s {:5.0} % of gemm's {plain:.1}",
        seconds * 1e3,
        100.0 * rate / plain
    );
}

/// GFLOP/s of the `gemm` crate on a product of about that many operations.
fn plain_product(threads: usize, operations: f64) -> f64 {
    let (rows, depth) = (4096, 512);
    let cols = ((operations / (2.0 * rows as f64 * depth as f64)) as usize).clamp(64, 8192) / 64 * 64;
    let (a, b) = (numbers(rows, depth), numbers(cols, depth));
    let mut out = Matrix::zeros(rows, cols);
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    let seconds = fastest(|| {
        // SAFETY: strides and sizes are those of the three matrices.
        unsafe {
            gemm::gemm(
                rows,
                cols,
                depth,
                out.data_mut().as_mut_ptr(),
                1,
                cols as isize,
                false,
                a.data().as_ptr(),
                1,
                depth as isize,
                b.data().as_ptr(),
                depth as isize,
                1,
                0.0_f32,
                1.0_f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    });
    2.0 * (rows * cols * depth) as f64 / seconds / 1e9
}

fn numbers(rows: usize, cols: usize) -> Matrix {
    let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
    Matrix::from_vec(rows, cols, (0..rows * cols).map(value).collect())
}

fn weight(cpu: &Cpu, rows: usize, cols: usize) -> Weight {
    let matrix = numbers(rows, cols);
    let bytes: Vec<u8> = matrix.data().iter().flat_map(|x| (x * 0.1).to_le_bytes()).collect();
    cpu.weight(WeightView { rows, cols, dtype: DType::F32, bytes: &bytes }).expect("finite")
}

fn causal(tokens: usize) -> Vec<AttentionTask> {
    vec![AttentionTask {
        queries: 0..tokens,
        segments: vec![Segment { source: 0, rows: 0..tokens, mask: Mask::Causal }],
    }]
}

fn attention(cpu: &Cpu, threads: usize, tokens: usize) {
    let qkv = numbers(tokens, SHAPE.qkv_width());
    let (k, v) = (numbers(tokens, SHAPE.kv_width()), numbers(tokens, SHAPE.kv_width()));
    let (tasks, mut out) = (causal(tokens), Matrix::zeros(tokens, SHAPE.q_width()));
    let seconds = fastest(|| {
        cpu.attention(SHAPE, &qkv, &[KvRef { k: &k, v: &v }], &tasks, &mut out, None).expect("shapes");
    });
    // Scores and their product with the values, for half of all pairs.
    let operations = 2.0 * 2.0 * SHAPE.q_width() as f64 * tokens as f64 * (tokens + 1) as f64 / 2.0;
    report(&format!("causal attention, {tokens} tokens"), threads, operations, seconds);
}

fn attention_of_one(cpu: &Cpu, tokens: usize) {
    let qkv = numbers(1, SHAPE.qkv_width());
    let (k, v) = (numbers(tokens, SHAPE.kv_width()), numbers(tokens, SHAPE.kv_width()));
    let segments = vec![Segment { source: 0, rows: 0..tokens, mask: Mask::Causal }];
    let (tasks, mut out) = ([AttentionTask { queries: 0..1, segments }], Matrix::zeros(1, SHAPE.q_width()));
    let seconds = fastest(|| {
        cpu.attention(SHAPE, &qkv, &[KvRef { k: &k, v: &v }], &tasks, &mut out, None).expect("shapes");
    });
    report_memory(&format!("attention of one query, {tokens} keys"), 2 * tokens * SHAPE.kv_width(), seconds);
}

fn report_memory(what: &str, elements: usize, seconds: f64) {
    println!("{what:<44} {:9.3} ms {:8.1} GB/s", seconds * 1e3, (elements * size_of::<f32>()) as f64 / seconds / 1e9);
}

fn linear(cpu: &Cpu, threads: usize, (rows, inputs, outputs): (usize, usize, usize)) {
    let (x, w) = (numbers(rows, inputs), weight(cpu, outputs, inputs));
    let mut out = Matrix::zeros(rows, outputs);
    let seconds = fastest(|| cpu.linear(rows, &x, &w, None, false, &mut out).expect("shapes"));
    report(
        &format!("linear, {rows} x {inputs} -> {outputs}"),
        threads,
        2.0 * (rows * inputs * outputs) as f64,
        seconds,
    );
}

fn linear_of_one(cpu: &Cpu, (inputs, outputs): (usize, usize)) {
    let (x, w) = (numbers(1, inputs), weight(cpu, outputs, inputs));
    let mut out = Matrix::zeros(1, outputs);
    let seconds = fastest(|| cpu.linear(1, &x, &w, None, false, &mut out).expect("shapes"));
    report_memory(&format!("linear, 1 x {inputs} -> {outputs}"), inputs * outputs, seconds);
}

fn mlp(cpu: &Cpu, threads: usize, rows: usize) {
    let (gate_up, down) = (weight(cpu, 2 * MLP, HIDDEN), weight(cpu, HIDDEN, MLP));
    let (h, mut x) = (numbers(rows, HIDDEN), Matrix::zeros(rows, HIDDEN));
    let seconds = fastest(|| cpu.mlp(rows, &h, &gate_up, &down, &mut x).expect("shapes"));
    report(&format!("mlp, {rows} rows"), threads, 6.0 * (rows * HIDDEN * MLP) as f64, seconds);
}

/// The layers of a model of 7 million parameters over a document, full attention: one layer measured, all of them reported.
fn prefill_layers(cpu: &Cpu, tokens: usize) {
    let (norm, qkv_weight) = (weight(cpu, 1, HIDDEN), weight(cpu, SHAPE.qkv_width(), HIDDEN));
    let (o, gate_up, down) =
        (weight(cpu, HIDDEN, SHAPE.q_width()), weight(cpu, 2 * MLP, HIDDEN), weight(cpu, HIDDEN, MLP));
    let (mut x, mut h) = (numbers(tokens, HIDDEN), Matrix::zeros(tokens, HIDDEN));
    let (mut qkv, mut out) = (Matrix::zeros(tokens, SHAPE.qkv_width()), Matrix::zeros(tokens, SHAPE.q_width()));
    let (mut k, mut v) = (Matrix::zeros(tokens, SHAPE.kv_width()), Matrix::zeros(tokens, SHAPE.kv_width()));
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let inv_freq: Vec<f32> = (0..32).map(|i| 1e6_f32.powf(-(i as f32) / 32.0)).collect();
    let mut stages = [("norm", 0.0), ("qkv", 0.0), ("rope", 0.0), ("attention", 0.0), ("o", 0.0), ("mlp", 0.0)];
    let mut stage = |i: usize, run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        stages[i].1 += start.elapsed().as_secs_f64();
    };
    stage(0, &mut || cpu.rms_norm(tokens, &x, &norm, 1e-5, &mut h).expect("shapes"));
    stage(1, &mut || cpu.linear(tokens, &h, &qkv_weight, None, false, &mut qkv).expect("shapes"));
    stage(2, &mut || {
        let kv = KvMut { k: &mut k, v: &mut v, first_row: 0 };
        cpu.rope_store(SHAPE, 0..tokens, &positions, &inv_freq, 1.0, &mut qkv, kv).expect("shapes");
    });
    let tasks = causal(tokens);
    stage(3, &mut || {
        cpu.attention(SHAPE, &qkv, &[KvRef { k: &k, v: &v }], &tasks, &mut out, None).expect("shapes");
    });
    stage(4, &mut || cpu.linear(tokens, &out, &o, None, true, &mut x).expect("shapes"));
    stage(0, &mut || cpu.rms_norm(tokens, &x, &norm, 1e-5, &mut h).expect("shapes"));
    stage(5, &mut || cpu.mlp(tokens, &h, &gate_up, &down, &mut x).expect("shapes"));
    let total: f64 = stages.iter().map(|(_, seconds)| seconds).sum();
    println!("prefill of {tokens} tokens, {LAYERS} layers: {:.2} s", total * LAYERS as f64);
    for (name, seconds) in stages {
        println!("  {name:<10} {:9.1} ms a layer", seconds * 1e3);
    }
}
