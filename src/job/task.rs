//! What is done with the documents, and with which prompt.
//!
//! Invariant: every name here is part of the wire form; renaming one breaks producers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What to do with the documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// An outline of the document.
    Summarise,
    /// Fields of the document as JSON that follows a schema.
    Extract,
    /// An answer to a question.
    Ask,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 3] = [Self::Summarise, Self::Extract, Self::Ask];

    /// Name on the wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Summarise => "summarise",
            Self::Extract => "extract",
            Self::Ask => "ask",
        }
    }

    /// The template of a job that names none.
    pub fn default_template(self) -> TemplateId {
        TemplateId { name: self.as_str().to_owned(), version: 1 }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|task| task.as_str() == text)
            .ok_or_else(|| format!("'{text}' is not a task: summarise, extract or ask"))
    }
}

/// What to do when the context is longer than the model takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// The job fails with `context_too_long`.
    #[default]
    Fail,
    /// The middle of the document is left out; the result says how much.
    TruncateMiddle,
    /// The document is processed in parts, and the parts' outputs once more; the result says so.
    MapReduce,
}

/// A prompt template, `name@version`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TemplateId {
    /// `[a-z0-9_-]{1,64}`.
    pub name: String,
    /// From 1.
    pub version: u32,
}

impl fmt::Display for TemplateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

impl FromStr for TemplateId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('@').and_then(|(name, version)| Some((name, version.parse().ok()?)));
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
        match parsed {
            Some((name, version)) if version >= 1 && (1..=64).contains(&name.len()) && name.chars().all(plain) => {
                Ok(Self { name: name.to_owned(), version })
            }
            _ => Err("expected name@version, such as summarise@1".to_owned()),
        }
    }
}
