//! Prefills of whole documents: tokens per second, and where the time goes, in the stages of the paper.
//!
//! Invariant: the speed is that of runs that are not profiled; the shares come from one more that is.

use serde_json::json;

use super::Options;
use super::cuda::{device, engine, engine_failed, failed, plan, random_tokens, row};
use super::report::{Row, median, rounded};
use crate::cli::CliError;
use crate::engine::{CudaEngine, Driver, EngineError, Job, Progress};
use crate::generate::generator::Step;

/// Appends a row for each length and strategy.
pub(super) fn measure(options: &Options, rows: &mut Vec<Row>) -> Result<(), CliError> {
    let engine = engine(options, device(options, rows)?)?;
    for &tokens in &options.tokens {
        for &strategy in &options.attention {
            rows.push(one(options, &engine, &plan(options, &engine, tokens, strategy)?)?);
        }
    }
    Ok(())
}

fn one(options: &Options, engine: &CudaEngine, plan: &crate::plan::PrefillPlan) -> Result<Row, CliError> {
    let (context, query) =
        (random_tokens(plan.context, engine.spec().vocab), random_tokens(plan.query, engine.spec().vocab));
    let job = Job { context: &context, query: &query, plan, new_tokens: 1 };
    let run = || engine.run(&job, &mut OnlyPrefill).map_err(engine_failed);
    let backend = engine.devices().backend();
    backend.watch_memory();
    run()?;
    let peak = backend.peak_bytes() as f64 / f64::from(1 << 30);
    let times = (0..options.repeats).map(|_| Ok(run()?.prefill.as_secs_f64())).collect::<Result<Vec<_>, CliError>>()?;
    let seconds = median(times);
    let mut row = row(options, plan);
    row["what"] = json!("prefill");
    row.insert("seconds".to_owned(), rounded(seconds, 4));
    row.insert("tokens_s".to_owned(), rounded(plan.context as f64 / seconds, 0));
    row.insert("peak_gib".to_owned(), rounded(peak, 2));
    backend.start_profile().map_err(failed)?;
    run()?;
    let profile = backend.finish_profile().map_err(failed)?;
    let whole: f32 = profile.iter().map(|(_, ms)| ms).sum();
    for (stage, ms) in stages(&profile) {
        row.insert(format!("{stage}_ms"), rounded(f64::from(ms), 1));
        if stage == "other" {
            row.insert("other_percent".to_owned(), rounded(f64::from(100.0 * ms / whole), 1));
        }
    }
    Ok(row)
}

/// Milliseconds of the paper's stages. One rank has no communication.
fn stages(profile: &[(&'static str, f32)]) -> Vec<(&'static str, f32)> {
    let mut sums = ["qkv", "retaining_head", "attention", "o", "ffn", "other"].map(|stage| (stage, 0.0));
    for (op, ms) in profile {
        let stage = match *op {
            "linear" => "qkv",
            "retaining_scores" | "top_k" | "gather_kv" => "retaining_head",
            "attention" => "attention",
            "linear_add" => "o",
            "mlp" => "ffn",
            _ => "other",
        };
        sums.iter_mut().filter(|(name, _)| *name == stage).for_each(|(_, sum)| *sum += ms);
    }
    sums.to_vec()
}

/// Ends as soon as the first token could be chosen.
struct OnlyPrefill;

impl Driver for OnlyPrefill {
    fn progress(&mut self, _: Progress) -> bool {
        true
    }

    fn next(&mut self, _: &mut [f32]) -> Result<Step, EngineError> {
        Ok(Step::Stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_belongs_to_one_stage() {
        let profile =
            [("linear", 1.0), ("mlp", 2.0), ("rms_norm", 4.0), ("attention", 8.0), ("top_k", 16.0), ("start", 32.0)];
        let stages = stages(&profile);
        assert_eq!(stages.iter().map(|(_, ms)| ms).sum::<f32>(), 63.0);
        assert!(stages.contains(&("other", 36.0)) && stages.contains(&("retaining_head", 16.0)));
    }
}
