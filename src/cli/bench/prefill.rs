//! Prefills of whole documents: tokens per second, and where the time goes, in the stages of the paper.
//!
//! Invariant: the speed is that of runs that are not profiled; the shares come from one more that is.

use serde_json::json;

use super::Options;
use super::cuda::{engine, engine_failed, failed, plan, random_tokens, refusal, row};
use super::report::{Row, median, rounded};
use crate::backend::BackendError;
use crate::backend::cuda::{Cuda, WAITING};
use crate::cli::CliError;
use crate::engine::{CudaEngine, Driver, EngineError, Job, Progress};
use crate::generate::generator::Step;

/// Appends a row for each length and strategy, and with several GPUs one for each of them.
pub(super) fn measure(options: &Options, rows: &mut Vec<Row>) -> Result<(), CliError> {
    let engine = engine(options, rows)?;
    for &tokens in &options.tokens {
        for &strategy in &options.attention {
            match plan(options, &engine, tokens, strategy) {
                Ok(plan) => rows.extend(one(options, &engine, &plan)?),
                Err(error) => rows.push(refusal(options, tokens, strategy, error)?),
            }
        }
    }
    Ok(())
}

fn one(options: &Options, engine: &CudaEngine, plan: &crate::plan::PrefillPlan) -> Result<Vec<Row>, CliError> {
    let (context, query) =
        (random_tokens(plan.context, engine.spec().vocab), random_tokens(plan.query, engine.spec().vocab));
    let job = Job { context: &context, query: &query, plan, new_tokens: 1 };
    let run = || Ok(engine.run(&job, &mut OnlyPrefill).map_err(engine_failed)?.prefill.as_secs_f64());
    let backends: Vec<_> = engine.devices().backends().take(plan.active_ranks(options.gpus())).collect();
    backends.iter().for_each(|backend| backend.watch_memory());
    let cold = run()?;
    let peak = backends.iter().map(|backend| backend.peak_bytes()).max().unwrap_or(0) as f64 / f64::from(1 << 30);
    let seconds = match options.once {
        true => cold,
        false => median((0..options.repeats).map(|_| run()).collect::<Result<_, CliError>>()?),
    };
    let mut row = row(options, plan);
    row["what"] = json!("prefill");
    row.insert("seconds".to_owned(), rounded(seconds, 4));
    row.insert("tokens_s".to_owned(), rounded(plan.context as f64 / seconds, 0));
    row.insert("peak_gib".to_owned(), rounded(peak, 2));
    if options.once {
        row.insert("once".to_owned(), json!(true));
        return Ok(vec![row]);
    }
    backends.iter().try_for_each(|backend| backend.start_profile()).map_err(failed)?;
    run()?;
    let shares = backends.iter().map(|backend| Share::of(backend)).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    // The others wait for the one that has most to compute.
    let longest = shares.iter().max_by(|a, b| a.computing().total_cmp(&b.computing()));
    if let Some(longest) = longest {
        longest.describe(&mut row);
    }
    let mut rows = vec![row];
    if shares.len() > 1 {
        rows.extend(shares.iter().enumerate().map(|(rank, share)| share.row(options, plan, rank)));
    }
    Ok(rows)
}

/// What one GPU spent its time on, in milliseconds.
struct Share {
    stages: Vec<(&'static str, f32)>,
    /// Collectives, from when they could begin to their end; hidden behind computing but for the stage of that name.
    collectives: f32,
}

impl Share {
    fn of(backend: &Cuda) -> Result<Self, BackendError> {
        let stages = stages(&backend.finish_profile()?);
        Ok(Self { stages, collectives: backend.lane_profile()?.iter().map(|(_, ms)| ms).sum() })
    }

    fn computing(&self) -> f32 {
        self.stages.iter().filter(|(stage, _)| *stage != WAITING).map(|(_, ms)| ms).sum()
    }

    fn describe(&self, row: &mut Row) {
        let whole: f32 = self.stages.iter().map(|(_, ms)| ms).sum();
        let percent = |ms: f32| rounded(f64::from(100.0 * ms / whole), 1);
        for (stage, ms) in &self.stages {
            row.insert(format!("{stage}_ms"), rounded(f64::from(*ms), 1));
            if *stage == "other" || *stage == WAITING {
                row.insert(format!("{stage}_percent"), percent(*ms));
            }
        }
        row.insert("collectives_ms".to_owned(), rounded(f64::from(self.collectives), 1));
    }

    fn row(&self, options: &Options, plan: &crate::plan::PrefillPlan, rank: usize) -> Row {
        let mut row = row(options, plan);
        row["what"] = json!("prefill of one rank");
        row.insert("rank".to_owned(), json!(rank));
        self.describe(&mut row);
        row
    }
}

/// Milliseconds of the paper's stages.
fn stages(profile: &[(&'static str, f32)]) -> Vec<(&'static str, f32)> {
    let names = ["qkv", "retaining_head", WAITING, "attention", "o", "ffn", "other"];
    let mut sums = names.map(|stage| (stage, 0.0));
    for (op, ms) in profile {
        let stage = match *op {
            "linear" => "qkv",
            "retaining_scores" | "query_aware_scores" | "top_k" | "gather_kv" => "retaining_head",
            WAITING => WAITING,
            "attention" | "merge" => "attention",
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
        let profile = [
            ("linear", 1.0),
            ("mlp", 2.0),
            ("rms_norm", 4.0),
            ("attention", 8.0),
            ("top_k", 16.0),
            ("start", 32.0),
            (WAITING, 64.0),
        ];
        let stages = stages(&profile);
        assert_eq!(stages.iter().map(|(_, ms)| ms).sum::<f32>(), 127.0);
        assert!(stages.contains(&(WAITING, 64.0)));
        assert!(stages.contains(&("other", 36.0)) && stages.contains(&("retaining_head", 16.0)));
    }
}
