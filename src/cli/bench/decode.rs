//! Generated tokens after a prefill: milliseconds a token, beside what the bandwidth allows.
//!
//! Invariant: the time of a token is from one choice to the next, the choice itself included.

use std::time::Instant;

use serde_json::json;

use super::Options;
use super::cuda::{engine, engine_failed, plan, random_tokens, row};
use super::report::{Row, median, rounded};
use crate::backend::cuda::KvCacheType;
use crate::cli::CliError;
use crate::engine::{CudaEngine, Driver, EngineError, Job, Progress};
use crate::generate::generator::Step;
use crate::generate::sampler::{Choice, argmax};
use crate::model::ModelSpec;

/// Tokens whose times do not count.
const WARM_UP: usize = 4;

/// Appends a row for each length and strategy.
pub(super) fn measure(options: &Options, rows: &mut Vec<Row>) -> Result<(), CliError> {
    let engine = engine(options, rows)?;
    let copy_gb_s = rows.last().and_then(|row| row.get("copy_gb_s")?.as_f64()).unwrap_or(f64::NAN);
    for &tokens in &options.tokens {
        for &strategy in &options.attention {
            let plan = plan(options, &engine, tokens, strategy).map_err(engine_failed)?;
            let mut row = one(options, &engine, &plan)?;
            // A copy reads and writes; reading alone is as fast per byte that passes.
            let cache = options.kv_cache.of_cuda();
            let ranks = options.gpus();
            let bytes = weight_bytes(engine.spec(), ranks) + cache_bytes(engine.spec(), tokens, cache) / ranks as f64;
            let floor = bytes / copy_gb_s / 1e6;
            row.insert("floor_ms".to_owned(), rounded(floor, 2));
            rows.push(row);
        }
    }
    Ok(())
}

fn one(options: &Options, engine: &CudaEngine, plan: &crate::plan::PrefillPlan) -> Result<Row, CliError> {
    let (context, query) =
        (random_tokens(plan.context, engine.spec().vocab), random_tokens(plan.query, engine.spec().vocab));
    let new_tokens = options.steps + WARM_UP + 1;
    let job = Job { context: &context, query: &query, plan, new_tokens };
    let mut driver = Steps::new(new_tokens);
    engine.run(&job, &mut driver).map_err(engine_failed)?;
    let ms = median(driver.gaps_ms().skip(WARM_UP).collect());
    let mut row = row(options, plan);
    row["what"] = json!("decode");
    row.insert("ms_a_token".to_owned(), rounded(ms, 3));
    row.insert("tokens_s".to_owned(), rounded(1e3 / ms, 1));
    Ok(row)
}

/// Bytes of weights that a step reads on the rank that reads most.
pub(super) fn weight_bytes(spec: &ModelSpec, ranks: usize) -> f64 {
    let (width, tokens) = (spec.intermediate.div_ceil(ranks), spec.vocab.div_ceil(ranks));
    let layer = spec.hidden * (spec.shape.qkv_width() + spec.shape.q_width() + 3 * width);
    (2 * (spec.layers * layer + tokens * spec.hidden)) as f64
}

/// Bytes of a sequence's keys and values.
pub(super) fn cache_bytes(spec: &ModelSpec, tokens: usize, cache: KvCacheType) -> f64 {
    (spec.layers * cache.bytes(2 * spec.shape.kv_width() * tokens, spec.shape.head_dim)) as f64
}

/// Takes the likeliest token so many times, and the time of each.
pub(super) struct Steps {
    left: usize,
    chosen: Vec<Instant>,
}

impl Steps {
    /// For `tokens` tokens, at least one.
    pub fn new(tokens: usize) -> Self {
        Self { left: tokens, chosen: Vec::with_capacity(tokens) }
    }

    /// Milliseconds from each token to the next.
    pub fn gaps_ms(&self) -> impl Iterator<Item = f64> {
        self.chosen.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3)
    }
}

impl Driver for Steps {
    fn progress(&mut self, _: Progress) -> bool {
        true
    }

    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        let token = argmax(logits).ok_or_else(|| EngineError::Model { reason: "logits are not finite".to_owned() })?;
        self.take(token)
    }

    fn choice(&mut self) -> Option<Choice> {
        Some(Choice { temperature: 0.0, top_p: 1.0, draw: 0.0 })
    }

    fn take(&mut self, token: u32) -> Result<Step, EngineError> {
        self.chosen.push(Instant::now());
        self.left -= 1;
        Ok(if self.left == 0 { Step::Stop } else { Step::Continue(token) })
    }
}
