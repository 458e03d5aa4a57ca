//! Prefill of the fixture model on the CPU: full attention, star and APB at several lengths, in one run.
//!
//! `cargo bench --bench cpu_prefill [-- THREADS [TOKENS…]]` prints one JSON line a setting, the fastest of its runs, with the time as a share of
//! full attention's. `tests/bench/peer_cpu.py` does the same by PyTorch.

use std::path::Path;
use std::time::Duration;

use apbd::engine::{Engine, InferRequest, LocalEngine, LocalOptions};
use apbd::generate::GenerationOptions;
use apbd::plan::{AttentionMode, AttentionRequest};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

/// Special tokens of the fixture model come first.
const TOKENS: std::ops::Range<u32> = 6..4096;
const QUERY: usize = 20;
const HOSTS: usize = 8;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let mut options = LocalOptions::default();
    if let Some(&threads) = numbers.first() {
        options.threads = threads;
    }
    let lengths = if numbers.len() > 1 { numbers[1..].to_vec() } else { vec![4096, 16384, 32768, 65000] };
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
    let engine = LocalEngine::open(&model, &options).expect("the fixture model");
    for length in lengths {
        let full = measure(&engine, length, AttentionMode::Full);
        for (mode, name) in [(AttentionMode::Full, "full"), (AttentionMode::Star, "star"), (AttentionMode::Apb, "apb")]
        {
            let time = if mode == AttentionMode::Full { full } else { measure(&engine, length, mode) };
            let line = json!({
                "attention": name, "hosts": if mode == AttentionMode::Full { 1 } else { HOSTS }, "threads": options.threads, "tokens": length,
                "seconds": time.as_secs_f64(), "tokens_per_s": (length as f64 / time.as_secs_f64()).round(),
                "times_as_fast_as_full": full.as_secs_f64() / time.as_secs_f64()
            });
            println!("{line}");
        }
    }
}

/// The paper's settings for 32K, scaled with the length; a run of more than ten seconds is not repeated.
fn measure(engine: &LocalEngine, length: usize, mode: AttentionMode) -> Duration {
    let rng = &mut StdRng::seed_from_u64(length as u64);
    let mut draw = |count: usize| (0..count).map(|_| rng.random_range(TOKENS)).collect::<Vec<u32>>();
    let anchor = (mode == AttentionMode::Apb).then_some(length / 32);
    let request = InferRequest {
        context: draw(length),
        query: draw(QUERY),
        query_at: 4,
        attention: AttentionRequest {
            mode: Some(mode),
            hosts: (mode != AttentionMode::Full).then_some(HOSTS),
            anchor,
            passing: anchor.map(|anchor| anchor / 2),
            ..AttentionRequest::default()
        },
        generation: GenerationOptions { max_new_tokens: 1, ..GenerationOptions::default() },
    };
    let run = || engine.infer(&request, &|_| true).expect("it fits").prefill;
    let first = run();
    if first > Duration::from_secs(10) {
        return first;
    }
    (0..3).map(|_| run()).fold(first, Duration::min)
}
