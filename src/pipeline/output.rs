//! What the engine gave, made the job's result: cleaned, parsed, validated, flagged.
//!
//! Invariant: nothing is repaired silently; whatever the output lacks is a flag.

use serde_json::Value;

use crate::engine::{EngineInfo, InferOutcome};
use crate::generate::StopReason;
use crate::job::clean::{clean, clean_json, needs_cleaning};
use crate::job::{Job, JobResult, ResultFlags, TokenCount};

/// The result of `job`. `flags` are those known before the inference.
pub(super) fn result(job: &Job, flags: ResultFlags, outcome: InferOutcome, engine: EngineInfo) -> JobResult {
    let text = clean(outcome.text.trim()).into_owned();
    let (extraction, escaped) = job.schema.as_ref().and_then(|_| parse(&text)).unzip();
    let follows = |schema: &Value| extraction.as_ref().is_some_and(|value| jsonschema::is_valid(schema, value));
    let flags = ResultFlags {
        approximate_attention: !outcome.plan.exact,
        output_truncated: outcome.stop == StopReason::Length,
        schema_failed: job.schema.as_ref().is_some_and(|schema| !follows(schema)),
        text_cleaned: flags.text_cleaned || needs_cleaning(&outcome.text) || escaped == Some(true),
        ..flags
    };
    JobResult {
        text,
        extraction,
        tokens_in: TokenCount((outcome.plan.context + outcome.plan.query) as u64),
        tokens_out: TokenCount(outcome.tokens.len() as u64),
        stop: outcome.stop,
        model: engine.model,
        model_digest: engine.model_digest,
        device: engine.device,
        plan: outcome.plan,
        flags,
    }
}

/// The output as JSON, and whether it had to be cleaned: escapes can bring back what is not in the text.
fn parse(text: &str) -> Option<(Value, bool)> {
    let mut value = serde_json::from_str(text).ok()?;
    let cleaned = clean_json(&mut value);
    Some((value, cleaned))
}
