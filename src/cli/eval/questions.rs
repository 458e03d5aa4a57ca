//! The file of questions: JSON lines, each with a document, what is asked about it and the right answer.
//!
//! Invariant: what is wrong with the file or with a document is said before the first question is asked.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::cli::CliError;
use crate::cli::run::options::schema_of;
use crate::document::decode;
use crate::job::Task;
use crate::job::clean::clean;
use crate::prompt::{Instruction, Prompter};

/// A line of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Relative to the file's own folder.
    document: PathBuf,
    task: Task,
    /// For `ask`.
    question: Option<String>,
    /// For `extract`.
    #[serde(default)]
    fields: Vec<String>,
    answer: Value,
    /// Whatever the questions are to be told apart by.
    kind: Option<String>,
}

/// A question and its answer.
#[derive(Debug)]
pub(super) struct Question {
    pub task: Task,
    pub kind: String,
    pub instruction: Instruction,
    pub schema: Option<Value>,
    pub answer: Value,
}

/// A document as tokens, and the questions about it.
#[derive(Debug)]
pub(super) struct Document {
    pub name: String,
    pub tokens: Vec<u32>,
    pub questions: Vec<Question>,
}

/// Reads the file and its documents; of each document the first `limit` questions.
pub(super) fn read(path: &Path, limit: Option<usize>, prompter: &Prompter) -> Result<Vec<Document>, CliError> {
    let text =
        fs::read_to_string(path).map_err(|error| CliError::Usage(format!("questions {}: {error}", path.display())))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut documents: Vec<Document> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |reason: String| CliError::Usage(format!("{}, line {}: {reason}", path.display(), i + 1));
        let line: Line = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
        let name = line.document.display().to_string();
        let known = documents.iter().position(|document| document.name == name);
        let at = match known {
            Some(at) => at,
            None => {
                let tokens = tokens(&folder.join(&line.document), prompter).map_err(wrong)?;
                documents.push(Document { name, tokens, questions: Vec::new() });
                documents.len() - 1
            }
        };
        let question = question(line).map_err(wrong)?;
        if limit.is_none_or(|limit| documents[at].questions.len() < limit) {
            documents[at].questions.push(question);
        }
    }
    match documents.is_empty() {
        true => Err(CliError::Usage(format!("{}: there is no question in it", path.display()))),
        false => Ok(documents),
    }
}

fn tokens(path: &Path, prompter: &Prompter) -> Result<Vec<u32>, String> {
    let named = |reason: String| format!("{}: {reason}", path.display());
    let bytes = fs::read(path).map_err(|error| named(error.to_string()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let decoded = decode(&bytes, &name, None).map_err(|error| named(error.to_string()))?;
    prompter.document(&clean(decoded.text.as_str())).map_err(|error| named(error.to_string()))
}

fn question(line: Line) -> Result<Question, String> {
    let fields: Vec<&str> = line.fields.iter().map(String::as_str).collect();
    let schema = match (line.task, fields.is_empty()) {
        (Task::Extract, true) => return Err("extract needs \"fields\"".to_owned()),
        (Task::Extract, false) => Some(schema_of(&fields)),
        (_, true) => None,
        (task, false) => return Err(format!("\"fields\" mean nothing for {task}")),
    };
    let instruction =
        Instruction::new(line.task, &line.task.default_template(), line.question.as_deref(), schema.as_ref())?;
    let kind = line.kind.unwrap_or_else(|| line.task.to_string());
    Ok(Question { task: line.task, kind, instruction, schema, answer: line.answer })
}
