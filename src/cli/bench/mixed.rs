//! A mixed lot of documents, all brought at once: what a day's queue does to one engine. Documents an hour, and how the time was spent.
//!
//! Invariant: every document is prefilled and generates as many tokens as were asked for; nothing is left out of the time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::cuda::{engine, engine_failed, plan, random_tokens};
use super::decode::Steps;
use super::report::{Row, median, rounded};
use super::{MixedOptions, Strategy};
use crate::cli::CliError;
use crate::engine::{CudaEngine, Engine, EngineError, Job, Timing};
use crate::plan::PrefillPlan;

/// Documents of this length and more are read by the strategy asked for; `auto` reads shorter ones with full attention, and so does this.
const FULL_BELOW: usize = 8 * 1024;

/// What a document took.
struct Read {
    tokens: usize,
    timing: Timing,
    whole: Duration,
    /// Between two of its tokens, milliseconds.
    gaps: Vec<f64>,
}

/// Appends a row for each strategy.
pub(super) fn measure(options: &MixedOptions, rows: &mut Vec<Row>) -> Result<(), CliError> {
    let engine = engine(&options.common, rows)?;
    for &strategy in &options.common.attention {
        rows.push(one(options, &engine, strategy)?);
    }
    Ok(())
}

/// Lengths in equal ratios from the shortest to the longest, in the order of a fixed shuffle.
fn lengths(options: &MixedOptions) -> Vec<usize> {
    let (documents, last) = (options.documents, options.documents.saturating_sub(1).max(1) as f64);
    let ratio = options.longest as f64 / options.shortest as f64;
    let length = |index: usize| (options.shortest as f64 * ratio.powf(index as f64 / last)).round() as usize;
    // A step that shares no factor with the number of documents visits each once.
    let step = (1..documents.max(2)).rev().find(|step| gcd(*step, documents) == 1 && *step * 5 < documents * 3);
    (0..documents).map(|index| length(index * step.unwrap_or(1) % documents)).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn one(options: &MixedOptions, engine: &CudaEngine, strategy: Strategy) -> Result<Row, CliError> {
    let lengths = lengths(options);
    let plans = lengths.iter().map(|tokens| {
        let strategy = if *tokens < FULL_BELOW { Strategy::Full } else { strategy };
        plan(&options.common, engine, *tokens, strategy).map_err(engine_failed)
    });
    let plans = plans.collect::<Result<Vec<_>, CliError>>()?;
    let longest = plans.iter().max_by_key(|plan| plan.context);
    // The first of a shape looks for the fastest products.
    longest.map(|plan| read(engine, plan, 2)).transpose().map_err(engine_failed)?;
    let backend = engine.devices().backend();
    backend.watch_memory();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let (began, began_at) = (Instant::now(), SystemTime::now());
    scope(|scope| {
        for caller in 0..engine.info().concurrency.min(plans.len()) {
            let work = || {
                while let Some(plan) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = read(engine, plan, options.new_tokens);
                    done.lock().unwrap_or_else(|e| e.into_inner()).push(outcome);
                }
            };
            let builder = Builder::new().name(format!("apbd-caller-{caller}"));
            builder.spawn_scoped(scope, work).map_err(|error| CliError::Internal(error.to_string()))?;
        }
        Ok::<_, CliError>(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    let read = done.into_iter().collect::<Result<Vec<_>, _>>().map_err(engine_failed)?;
    Ok(row(options, strategy, &read, (seconds, began_at), backend.peak_bytes()))
}

fn row(
    options: &MixedOptions,
    strategy: Strategy,
    read: &[Read],
    (seconds, began_at): (f64, SystemTime),
    peak: usize,
) -> Row {
    let tokens: usize = read.iter().map(|read| read.tokens).sum();
    let generated = (read.len() * options.new_tokens) as f64;
    let mut gaps: Vec<f64> = read.iter().flat_map(|read| read.gaps.iter().copied()).collect();
    gaps.sort_by(f64::total_cmp);
    let at = |share: f64| gaps.get((gaps.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    let epoch = began_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let prefills = read.iter().map(|read| read.timing.prefill.as_secs_f64()).collect();
    let wholes = read.iter().map(|read| read.whole.as_secs_f64()).collect();
    let mut row = Row::new();
    row.insert("what".to_owned(), json!("mixed"));
    row.insert("shape".to_owned(), json!(options.common.shape.as_str()));
    row.insert("attention".to_owned(), json!(format!("{strategy:?}").to_lowercase()));
    row.insert("documents".to_owned(), json!(read.len()));
    row.insert("tokens".to_owned(), json!(tokens));
    row.insert("new_tokens".to_owned(), json!(options.new_tokens));
    row.insert("seconds".to_owned(), rounded(seconds, 2));
    row.insert("documents_h".to_owned(), rounded(read.len() as f64 / seconds * 3600.0, 1));
    row.insert("tokens_s".to_owned(), rounded(tokens as f64 / seconds, 0));
    row.insert("generated_s".to_owned(), rounded(generated / seconds, 1));
    row.insert("prefill_s_median".to_owned(), rounded(median(prefills), 2));
    row.insert("whole_s_median".to_owned(), rounded(median(wholes), 2));
    row.insert("gap_ms_p50".to_owned(), rounded(at(0.5), 1));
    row.insert("gap_ms_p99".to_owned(), rounded(at(0.99), 1));
    row.insert("peak_gib".to_owned(), rounded(peak as f64 / f64::from(1 << 30), 2));
    row.insert("began_epoch_s".to_owned(), rounded(epoch, 1));
    row
}

fn read(engine: &CudaEngine, plan: &PrefillPlan, new_tokens: usize) -> Result<Read, EngineError> {
    let vocab = engine.spec().vocab;
    let (context, query) = (random_tokens(plan.context, vocab), random_tokens(plan.query, vocab));
    let mut driver = Steps::new(new_tokens);
    let began = Instant::now();
    let timing = engine.run(&Job { context: &context, query: &query, plan, new_tokens }, &mut driver)?;
    Ok(Read { tokens: plan.context, timing, whole: began.elapsed(), gaps: driver.gaps_ms().collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::{Args, What};
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn every_length_is_there_once() {
        let line = Line::parse_from(["bench", "mixed", "--documents", "64"]);
        let What::Mixed(options) = line.args.what else { panic!("mixed") };
        let mut lengths = lengths(&options);
        assert_ne!(lengths[0], lengths[1] - 1);
        lengths.sort_unstable();
        lengths.dedup();
        assert_eq!((lengths.len(), lengths[0], lengths[63]), (64, 4096, 131_072));
    }
}
