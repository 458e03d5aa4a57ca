//! The same logits and tokens as `transformers`, for every model in fixtures/goldens.

use std::path::{Path, PathBuf};

use apbd::engine::{Engine, Job, LocalEngine, LocalOptions};
use apbd::plan::{AttentionMode, AttentionRequest};
use serde::Deserialize;

use super::runs::Forced;
use super::strategies::relative_error;

/// What `transformers` gave: logits of the query's last token, and the greedy continuation.
#[derive(Deserialize)]
struct Golden {
    context: Vec<u32>,
    query: Vec<u32>,
    last_logits: Vec<f64>,
    greedy: Vec<u32>,
}

const TOLERANCE: f64 = 2e-4;

fn goldens() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/goldens");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let models: Vec<PathBuf> = entries.filter(|path| path.join("golden.json").is_file()).collect();
    assert!(models.len() >= 4, "the goldens of four model families are part of the repository");
    models
}

fn check(model: &Path, mode: AttentionMode) {
    let text = std::fs::read_to_string(model.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let engine = LocalEngine::open(model, &LocalOptions { ranks: 2, threads: 2, ..LocalOptions::default() }).unwrap();
    let request = AttentionRequest { mode: Some(mode), hosts: Some(1), ..AttentionRequest::default() };
    let plan = engine.plan(golden.context.len(), golden.query.len(), 0, &request).unwrap();
    assert!(plan.exact);
    // The golden tokens are fed back, so that each step is compared on its own.
    let job = Job { context: &golden.context, query: &golden.query, plan: &plan, new_tokens: golden.greedy.len() };
    let mut driver = Forced::new(&golden.greedy);
    engine.run(&job, &mut driver).unwrap();
    let error = relative_error(&driver.logits[0], &golden.last_logits);
    assert!(error < TOLERANCE, "{} {mode:?}: relative error {error:e}", model.display());
    let greedy: Vec<u32> = driver.logits.iter().filter_map(|logits| apbd::generate::sampler::argmax(logits)).collect();
    assert_eq!(greedy[..golden.greedy.len()], golden.greedy, "{} {mode:?}", model.display());
}

#[test]
fn full_attention_equals_transformers() {
    goldens().iter().for_each(|model| check(model, AttentionMode::Full));
}

#[test]
fn apb_with_one_host_equals_transformers() {
    goldens().iter().for_each(|model| check(model, AttentionMode::Apb));
}

#[test]
fn ring_with_one_host_equals_transformers() {
    goldens().iter().for_each(|model| check(model, AttentionMode::Ring));
}
