//! What is to be done with the documents: options to a job message without documents.
//!
//! Invariant: a combination that means nothing is refused before anything is opened.

use std::fs;
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use crate::cli::CliError;
use crate::job::wire::{AttentionMessage, ModeMessage};
use crate::job::{JobMessage, Overflow, Task};

/// Generated tokens when nothing else is said: an outline of a long document takes some hundreds.
const MAX_NEW_TOKENS: u32 = 512;

/// Options of the jobs.
#[derive(Debug, clap::Args)]
pub(super) struct JobArgs {
    /// summarise (the default), extract or ask.
    #[arg(long, value_name = "TASK")]
    task: Option<Task>,
    /// Question to each document; means --task ask.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["fields", "schema"])]
    ask: Option<String>,
    /// Fields to extract, such as `owner,due_date`; means --task extract.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "schema")]
    fields: Vec<String>,
    /// JSON Schema of what to extract; means --task extract.
    #[arg(long, value_name = "FILE")]
    schema: Option<PathBuf>,
    /// More words for the model, after the task's own.
    #[arg(long, value_name = "TEXT", conflicts_with = "ask")]
    instruction: Option<String>,
    /// Attention: by default full for short documents, APB for long ones.
    #[arg(long, value_enum, default_value_t = Attention::Auto)]
    attention: Attention,
    /// Hosts: parts into which a document is cut.
    #[arg(long, value_name = "N")]
    hosts: Option<u32>,
    /// Anchor length in tokens.
    #[arg(long, value_name = "N")]
    anchor: Option<u32>,
    /// Passing length in tokens, per host and KV head.
    #[arg(long, value_name = "N")]
    passing: Option<u32>,
    /// Tokens of a document whose keys and values are kept once it has been read, per KV head; needs retaining heads, costs exactness. By default all.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    kv_budget: Option<u32>,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = MAX_NEW_TOKENS)]
    max_new_tokens: u32,
    /// 0 takes the likeliest token every time.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the choice of tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// What to do with a document that is longer than the model takes.
    #[arg(long, value_enum, default_value_t = OnOverflow::Fail)]
    overflow: OnOverflow,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Attention {
    Auto,
    Full,
    Ring,
    Ulysses,
    Star,
    Apb,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnOverflow {
    /// The document fails.
    Fail,
    /// The middle is left out, and the result says so.
    TruncateMiddle,
}

impl JobArgs {
    /// The message of every job, without its documents.
    pub fn message(&self) -> Result<JobMessage, CliError> {
        let task = self.task()?;
        let mut message = JobMessage::new(task, Vec::new());
        message.instruction = self.ask.clone().or(self.instruction.clone());
        message.schema = self.schema()?;
        let mode = match self.attention {
            Attention::Auto => ModeMessage::Auto,
            Attention::Full => ModeMessage::Full,
            Attention::Ring => ModeMessage::Ring,
            Attention::Ulysses => ModeMessage::Ulysses,
            Attention::Star => ModeMessage::Star,
            Attention::Apb => ModeMessage::Apb,
        };
        let (hosts, anchor, passing, kv_budget) = (self.hosts, self.anchor, self.passing, self.kv_budget);
        message.attention = Some(AttentionMessage { mode: Some(mode), hosts, anchor, passing, kv_budget });
        message.max_new_tokens = Some(self.max_new_tokens);
        message.temperature = Some(self.temperature);
        message.seed = Some(self.seed);
        message.overflow = Some(match self.overflow {
            OnOverflow::Fail => Overflow::Fail,
            OnOverflow::TruncateMiddle => Overflow::TruncateMiddle,
        });
        Ok(message)
    }

    fn task(&self) -> Result<Task, CliError> {
        let extracts = !self.fields.is_empty() || self.schema.is_some();
        let implied = match (&self.ask, extracts) {
            (Some(_), _) => Some(Task::Ask),
            (None, true) => Some(Task::Extract),
            (None, false) => None,
        };
        let usage = |reason: &str| Err(CliError::Usage(reason.to_owned()));
        match (self.task, implied) {
            (Some(task), Some(implied)) if task != implied => {
                usage(&format!("--task {task} does not go with the options of {implied}"))
            }
            (Some(Task::Ask), None) => usage("--task ask needs a question: --ask TEXT"),
            (Some(Task::Extract), None) => usage("--task extract needs --fields NAMES or --schema FILE"),
            (task, implied) => Ok(task.or(implied).unwrap_or(Task::Summarise)),
        }
    }

    fn schema(&self) -> Result<Option<Value>, CliError> {
        if let Some(path) = &self.schema {
            let wrong = |reason: String| CliError::Usage(format!("{}: {reason}", path.display()));
            let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
            let schema: Value =
                serde_json::from_str(&text).map_err(|error| wrong(format!("no valid JSON: {error}")))?;
            jsonschema::validator_for(&schema).map_err(|error| wrong(format!("no valid JSON Schema: {error}")))?;
            return Ok(Some(schema));
        }
        if self.fields.is_empty() {
            return Ok(None);
        }
        let names: Vec<&str> = self.fields.iter().map(|name| name.trim()).collect();
        if names.iter().any(|name| name.is_empty()) {
            return Err(CliError::Usage("--fields has an empty name".to_owned()));
        }
        Ok(Some(schema_of(&names)))
    }
}

/// The schema of an object that has these fields, all of them strings.
pub(in crate::cli) fn schema_of(names: &[&str]) -> Value {
    let properties: Map<String, Value> =
        names.iter().map(|name| ((*name).to_owned(), json!({ "type": "string" }))).collect();
    json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        job: JobArgs,
    }

    fn message(arguments: &[&str]) -> Result<JobMessage, CliError> {
        Line::try_parse_from([&["apbd"], arguments].concat())
            .map_err(|error| CliError::Usage(error.to_string()))?
            .job
            .message()
    }

    #[test]
    fn options_imply_their_task() {
        assert_eq!(message(&[]).expect("valid").task, Task::Summarise);
        let ask = message(&["--ask", "Who?"]).expect("valid");
        assert_eq!((ask.task, ask.instruction.as_deref()), (Task::Ask, Some("Who?")));
        let extract = message(&["--fields", "owner, due_date"]).expect("valid");
        let schema = extract.schema.expect("a schema");
        assert_eq!((extract.task, &schema["required"]), (Task::Extract, &json!(["owner", "due_date"])));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for arguments in [
            &["--task", "ask"][..],
            &["--task", "extract"],
            &["--task", "summarise", "--ask", "Who?"],
            &["--ask", "Who?", "--fields", "owner"],
            &["--fields", "a,,b"],
            &["--schema", "/nowhere.json"],
            &["--task", "translate"],
        ] {
            assert!(message(arguments).is_err(), "{arguments:?}");
        }
    }
}
