//! `apbd forward`: one context and query through a model, logits out. For parity work; needs no tokenizer.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine::devices::Devices;
use crate::engine::{Driver, Engine, EngineError, Job, ModelEngine, Progress};
use crate::generate::generator::Step;
use crate::generate::sampler::argmax;
use crate::plan::{AttentionRequest, PrefillPlan};

use super::attention::{AttentionName, SelectorName};
use super::device::{BackendName, DeviceArgs};
use super::execution::ExecutionArgs;
use super::{CliError, Status};

/// Arguments of `apbd forward`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory; config.json and weights are enough.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Retaining heads (safetensors); without it the model's own are used, if it has any.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// JSON with `{"context": [ids], "query": [ids]}`; `-` reads stdin.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Attention strategy.
    #[arg(long, value_enum, default_value_t = AttentionName::Auto)]
    attention: AttentionName,
    /// Hosts: parts into which the context is cut.
    #[arg(long, value_name = "N")]
    hosts: Option<usize>,
    /// Anchor length in tokens.
    #[arg(long, value_name = "N")]
    anchor: Option<usize>,
    /// Passing length in tokens, per host and KV head.
    #[arg(long, value_name = "N")]
    passing: Option<usize>,
    /// Context tokens before the query in the anchor.
    #[arg(long, value_name = "N", default_value_t = 0)]
    query_at: usize,
    /// How passed tokens are chosen; by default with retaining heads if there are any, else query-aware.
    #[arg(long, value_enum)]
    selector: Option<SelectorName>,
    /// Seed of the random selector.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Leave the query out of the anchor.
    #[arg(long)]
    no_query_in_anchor: bool,
    /// Greedy tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 1)]
    steps: usize,
    /// Tokens of the context whose keys and values are kept after the prefill, per KV head, chosen by retaining heads; by default all.
    #[arg(long, value_name = "N")]
    kv_budget: Option<usize>,
    #[command(flatten)]
    execution: ExecutionArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Token ids; other keys are ignored, so that a file with expected results can be given as it is.
#[derive(Debug, Deserialize)]
struct Input {
    context: Vec<u32>,
    query: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Output<'a> {
    greedy: &'a [u32],
    last_logits: &'a [f32],
    prefill_ms: f64,
    decode_ms: f64,
    plan: &'a PrefillPlan,
}

impl Args {
    /// Runs the model and prints one JSON object.
    pub fn execute(self) -> Result<Status, CliError> {
        let input = read(&self.input)?;
        let heads = self.heads.as_deref();
        match self.device.backend {
            BackendName::Cpu => self.forward(&self.device.open_cpu(&self.model, heads)?, &input),
            #[cfg(feature = "cuda")]
            BackendName::Cuda => self.forward(&self.device.open_cuda(&self.model, heads)?, &input),
            #[cfg(not(feature = "cuda"))]
            BackendName::Cuda => Err(super::device::no_cuda()),
        }
    }

    fn forward<D: Devices>(&self, engine: &ModelEngine<D>, input: &Input) -> Result<Status, CliError> {
        let (context, query) = (&input.context[..], &input.query[..]);
        let plan = engine.plan(context.len(), query.len(), self.query_at, &self.request()).map_err(cli_error)?;
        let job = Job { context, query, plan: &plan, new_tokens: self.steps };
        let mut greedy = Greedy { steps: self.steps, tokens: Vec::new(), last_logits: Vec::new() };
        let timing = engine.run(&job, &mut greedy).map_err(cli_error)?;
        let output = Output {
            greedy: &greedy.tokens,
            last_logits: &greedy.last_logits,
            prefill_ms: milliseconds(timing.prefill),
            decode_ms: milliseconds(timing.generate),
            plan: &plan,
        };
        let mut text = serde_json::to_string(&output).map_err(|error| CliError::Internal(error.to_string()))?;
        text.push('\n');
        super::print(&text)?;
        Ok(Status::Done)
    }

    fn request(&self) -> AttentionRequest {
        AttentionRequest {
            mode: self.attention.mode(),
            hosts: self.hosts,
            anchor: self.anchor,
            passing: self.passing,
            selector: self.selector.map(|name| name.selector(self.seed)),
            query_in_anchor: self.no_query_in_anchor.then_some(false),
            kv_budget: self.kv_budget,
            execution: self.execution.of_plan(),
        }
    }
}

/// Keeps the first logits and goes on greedily; stop tokens do not stop it.
struct Greedy {
    steps: usize,
    tokens: Vec<u32>,
    last_logits: Vec<f32>,
}

impl Driver for Greedy {
    fn progress(&mut self, _: Progress) -> bool {
        true
    }

    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        if self.last_logits.is_empty() {
            self.last_logits = logits.to_vec();
        }
        if let Some(bad) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(EngineError::Model { reason: format!("logit {bad} is {}", logits[bad]) });
        }
        if self.tokens.len() == self.steps {
            return Ok(Step::Stop);
        }
        let Some(token) = argmax(logits) else { return Ok(Step::Stop) };
        self.tokens.push(token);
        Ok(if self.tokens.len() == self.steps { Step::Stop } else { Step::Continue(token) })
    }
}

fn read(path: &Path) -> Result<Input, CliError> {
    let text = match path == Path::new("-") {
        true => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map(|_| text)
        }
        false => fs::read_to_string(path),
    };
    let usage = |reason: String| CliError::Usage(format!("--input {}: {reason}", path.display()));
    let text = text.map_err(|error| usage(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| usage(format!("not {{\"context\": [ids], \"query\": [ids]}}: {error}")))
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn cli_error(error: EngineError) -> CliError {
    match error {
        EngineError::Input { .. } | EngineError::Memory { .. } => CliError::Usage(error.to_string()),
        error => CliError::Internal(error.to_string()),
    }
}
