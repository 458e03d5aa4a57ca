//! `apbd eval`: questions with known answers, asked under one attention after the other: accuracy, speed and tokens side by side.
//!
//! Invariant: every attention is asked the same questions about the same tokens, by the code that `apbd run` runs.

mod questions;
mod report;
mod score;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::engine::{Engine, EngineError, InferOutcome, InferRequest};
use crate::generate::GenerationOptions;
use crate::plan::{AttentionMode, AttentionRequest};
use crate::prompt::Prompter;
use crate::telemetry::console;

use super::attention::{AttentionName, SelectorName};
use super::database::{Format, print_json};
use super::device::DeviceArgs;
use super::run::{model, prompter};
use super::{CliError, Status};
use questions::{Document, Question};
use report::{Answer, Tally, milliseconds};

/// Arguments of `apbd eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// JSON lines: {"document": "FILE beside this one", "task": "ask", "question": "...", "answer": "..."}, or "task": "extract" with "fields": [...]
    /// and an object as the answer; "kind" tells them apart in the report.
    #[arg(value_name = "QUESTIONS")]
    questions: PathBuf,
    /// Attentions to compare.
    #[arg(long, value_enum, value_name = "NAMES", value_delimiter = ',', default_values_t = [AttentionName::Full, AttentionName::Star, AttentionName::Apb])]
    attention: Vec<AttentionName>,
    /// Ways in which APB chooses what is passed on; by default the model's retaining heads, or query-aware without.
    #[arg(long, value_enum, value_name = "NAMES", value_delimiter = ',')]
    selector: Vec<SelectorName>,
    /// Hosts: parts into which a document is cut.
    #[arg(long, value_name = "N")]
    hosts: Option<usize>,
    /// Anchor length in tokens.
    #[arg(long, value_name = "N")]
    anchor: Option<usize>,
    /// Passing length in tokens, per host and KV head.
    #[arg(long, value_name = "N")]
    passing: Option<usize>,
    /// Tokens of a document whose keys and values are kept once it has been read, per KV head; by default all.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    kv_budget: Option<u32>,
    /// Leave the question out of APB's anchor.
    #[arg(long)]
    no_query_in_anchor: bool,
    /// Seed of the random selector.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Only so many questions of each document.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Model directory as published on Hugging Face; without it the small model that comes with apbd.
    #[arg(long, value_name = "DIR", env = model::VARIABLE)]
    model: Option<PathBuf>,
    /// Retaining heads (safetensors); without it the model's own, if it has any.
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Also write every answer to this file, as JSON lines.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How to print the figures.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    #[command(flatten)]
    device: DeviceArgs,
}

/// One attention that is compared.
struct Setting {
    name: String,
    request: AttentionRequest,
}

impl Args {
    /// Asks everything and prints the figures.
    pub fn execute(self) -> Result<Status, CliError> {
        let directory = model::find(self.model.as_deref()).map_err(CliError::Usage)?;
        let prompter = prompter(&directory)?;
        let documents = questions::read(&self.questions, self.limit, &prompter)?;
        let settings = self.settings();
        let mut out = self.out()?;
        let engine = self.device.open(&directory, self.heads.as_deref())?;
        let mut tallies: Vec<Tally> = settings.iter().map(|setting| Tally::new(setting.name.clone())).collect();
        let questions: usize = documents.iter().map(|document| document.questions.len()).sum();
        let bar = bar(questions * settings.len());
        for (i, document) in documents.iter().enumerate() {
            let (count, tokens) = (document.questions.len(), document.tokens.len());
            let place = format!("[{}/{}] {}", i + 1, documents.len(), document.name);
            console::line(&format!("{place}: {tokens} tokens, {count} questions under {} attentions", settings.len()));
            for question in &document.questions {
                for (setting, tally) in settings.iter().zip(&mut tallies) {
                    let line = self.ask(&*engine, &prompter, document, question, setting, tally)?;
                    out.as_mut()
                        .map_or(Ok(()), |out| writeln!(out, "{line}"))
                        .map_err(|error| self.unwritable(&error))?;
                    bar.inc(1);
                }
            }
        }
        bar.finish_and_clear();
        out.as_mut().map_or(Ok(()), Write::flush).map_err(|error| self.unwritable(&error))?;
        self.print(&*engine, questions, &tallies)?;
        Ok(if tallies.iter().all(|tally| tally.failed == 0) { Status::Done } else { Status::SomeFailed })
    }

    /// One question under one attention; the answer as a line of JSON.
    fn ask(
        &self,
        engine: &dyn Engine,
        prompter: &Prompter,
        document: &Document,
        question: &Question,
        setting: &Setting,
        tally: &mut Tally,
    ) -> Result<String, CliError> {
        let internal = |error: &dyn std::error::Error| CliError::Internal(error.to_string());
        let prompt = prompter.build(std::slice::from_ref(&document.tokens), &question.instruction);
        let prompt = prompt.map_err(|error| internal(&error))?;
        let tokens_in = prompt.len();
        let request = InferRequest {
            context: prompt.context,
            query: prompt.query,
            query_at: prompt.query_at,
            attention: setting.request.clone(),
            generation: GenerationOptions {
                max_new_tokens: self.max_new_tokens,
                schema: question.schema.clone(),
                ..GenerationOptions::default()
            },
        };
        let outcome = match engine.infer(&request, &|_| true) {
            Ok(outcome) => Ok(outcome),
            Err(error @ (EngineError::Input { .. } | EngineError::Memory { .. } | EngineError::Schema { .. })) => {
                Err(error)
            }
            Err(error) => return Err(internal(&error)),
        };
        let right = outcome.as_ref().is_ok_and(|outcome| score::right(question.task, &question.answer, &outcome.text));
        match &outcome {
            Ok(outcome) => tally.add(&question.kind, right, outcome),
            Err(error) => {
                tally.failed += 1;
                console::line(&format!("{}, {}: {error}", document.name, setting.name));
            }
        }
        let answered: Option<&InferOutcome> = outcome.as_ref().ok();
        let answer = Answer {
            document: &document.name,
            kind: &question.kind,
            asked: question.instruction.as_str(),
            expected: &question.answer,
            attention: &setting.name,
            given: answered.map(|outcome| outcome.text.as_str()),
            right,
            error: outcome.as_ref().err().map(EngineError::to_string),
            hosts: answered.map(|outcome| outcome.plan.hosts.len()),
            exact: answered.map(|outcome| outcome.plan.exact),
            tokens_in,
            tokens_out: answered.map_or(0, |outcome| outcome.tokens.len()),
            prefill_ms: answered.map_or(0.0, |outcome| milliseconds(outcome.prefill)),
            generate_ms: answered.map_or(0.0, |outcome| milliseconds(outcome.generate)),
        };
        serde_json::to_string(&answer).map_err(|error| internal(&error))
    }

    /// The attentions; APB once for every selector.
    fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        for name in &self.attention {
            let mode = name.mode();
            let apb = mode == Some(AttentionMode::Apb);
            let selectors: Vec<Option<SelectorName>> = if apb && !self.selector.is_empty() {
                self.selector.iter().copied().map(Some).collect()
            } else {
                vec![None]
            };
            for selector in selectors {
                settings.push(Setting {
                    name: [Some(shown(name)), selector.as_ref().map(shown)]
                        .into_iter()
                        .flatten()
                        .collect::<Vec<_>>()
                        .join(", "),
                    request: AttentionRequest {
                        mode,
                        hosts: self.hosts,
                        anchor: self.anchor,
                        passing: self.passing,
                        kv_budget: self.kv_budget.map(|tokens| tokens as usize),
                        selector: selector.map(|name| name.selector(self.seed)),
                        query_in_anchor: (apb && self.no_query_in_anchor).then_some(false),
                        ..AttentionRequest::default()
                    },
                });
            }
        }
        settings
    }

    fn out(&self) -> Result<Option<BufWriter<File>>, CliError> {
        self.out
            .as_ref()
            .map(|path| File::create(path).map(BufWriter::new).map_err(|error| self.unwritable(&error)))
            .transpose()
    }

    fn unwritable(&self, error: &std::io::Error) -> CliError {
        CliError::Usage(format!("--out {}: {error}", self.out.as_deref().unwrap_or("".as_ref()).display()))
    }

    fn print(&self, engine: &dyn Engine, questions: usize, tallies: &[Tally]) -> Result<(), CliError> {
        let info = engine.info();
        match self.format {
            Format::Table => report::print(tallies),
            Format::Json => print_json(&json!({
                "model": info.model, "model_digest": info.model_digest, "device": info.device,
                "questions": questions, "attentions": tallies,
            })),
        }
    }
}

fn shown(name: &impl clap::ValueEnum) -> String {
    name.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A bar over all questions, on a terminal.
fn bar(length: usize) -> ProgressBar {
    let bar = console::progress().add(ProgressBar::new(length as u64));
    // The template is constant; a broken one would show in every run.
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} answers, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
