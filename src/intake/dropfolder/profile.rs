//! What a drop folder is told: where it is, what to do with what is in it, and what with the files of jobs that have ended.
//!
//! Invariant: the message of a profile is complete but for its document.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use serde_json::Value;

use crate::job::{DocumentUri, JobMessage, Priority, Task, TemplateId};

/// End of the name of a file that says how the document of the same name without it is to be processed.
pub const SIDECAR: &str = ".job.json";

/// How documents become jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct DropProfile {
    /// What to do with them.
    pub task: Task,
    /// In words.
    pub instruction: Option<String>,
    /// Prompt template.
    pub template: Option<TemplateId>,
    /// JSON Schema of the output, for `extract`.
    pub schema: Option<Value>,
    /// Model.
    pub model: Option<String>,
    /// Urgency.
    pub priority: Priority,
}

impl DropProfile {
    /// The message of a job without its document.
    pub fn message(&self) -> JobMessage {
        JobMessage {
            instruction: self.instruction.clone(),
            template: self.template.as_ref().map(ToString::to_string),
            schema: self.schema.clone(),
            model: self.model.clone(),
            priority: Some(self.priority.get()),
            ..JobMessage::new(self.task, Vec::new())
        }
    }
}

/// Which profile a file of the place belongs to.
#[derive(Debug, Clone, PartialEq)]
pub enum Profiles {
    /// One for all.
    One(Box<DropProfile>),
    /// Named by the first folder of their names: `drop/<profile>/...`.
    ByFolder(BTreeMap<String, DropProfile>),
}

/// Whether documents have a file beside them that says how they are to be processed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sidecars {
    /// Such files are documents like others.
    None,
    /// They may.
    Optional,
    /// A document waits for its own.
    Required,
}

/// What is done with a file when its job has ended; nothing before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disposal {
    /// Nothing.
    Leave,
    /// The object gets this tag, with the state of the job.
    Tag(String),
    /// It goes to another prefix or folder, under its name below the watched one. Without `failed_to` only files of successful jobs go.
    Move { to: DocumentUri, failed_to: Option<DocumentUri> },
    /// Files of successful jobs are deleted; others stay.
    Delete,
}

/// A watched prefix or folder.
#[derive(Debug, Clone, PartialEq)]
pub struct DropPlace {
    /// Prefix (ends with `/`) or folder.
    pub at: DocumentUri,
    /// What to do with what is there.
    pub profiles: Profiles,
    /// Whether files beside documents are read.
    pub sidecars: Sidecars,
    /// How long a file must have been seen unchanged before it is taken.
    pub settle: Duration,
    /// How often to look.
    pub poll: Duration,
    /// What to do with files of jobs that have ended.
    pub disposal: Disposal,
    /// Queue at the broker that S3 event messages come by.
    pub events_queue: Option<String>,
}

impl DropPlace {
    /// The profile of a document, or why it has none.
    pub fn profile(&self, uri: &DocumentUri) -> Result<&DropProfile, String> {
        let profiles = match &self.profiles {
            Profiles::One(profile) => return Ok(profile),
            Profiles::ByFolder(profiles) => profiles,
        };
        let name = below(&self.at, uri).unwrap_or_default();
        let name = name.split(|byte| *byte == b'/').next().filter(|first| first.len() < name.len()).unwrap_or_default();
        let found = std::str::from_utf8(name).ok().and_then(|name| profiles.get(name));
        found.ok_or_else(|| {
            let names: Vec<&str> = profiles.keys().map(String::as_str).collect();
            format!("it is in the folder of no profile; there are: {}", names.join(", "))
        })
    }
}

/// The name of a document below a place.
pub(super) fn below<'a>(place: &DocumentUri, uri: &'a DocumentUri) -> Option<&'a [u8]> {
    match (place, uri) {
        (DocumentUri::S3 { store, bucket, key: prefix }, DocumentUri::S3 { store: of, bucket: r#in, key })
            if store == of && bucket == r#in =>
        {
            key.strip_prefix(prefix).map(str::as_bytes)
        }
        (DocumentUri::File { path: folder }, DocumentUri::File { path }) => {
            path.strip_prefix(folder).ok().map(|rest| rest.as_os_str().as_bytes())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_folder_names_the_profile() {
        let profile = |task| DropProfile {
            task,
            instruction: None,
            template: None,
            schema: None,
            model: None,
            priority: Priority::NORMAL,
        };
        let place = DropPlace {
            at: "s3://main/b/drop/".parse().expect("a URI"),
            profiles: Profiles::ByFolder(BTreeMap::from([("sum".to_owned(), profile(Task::Summarise))])),
            sidecars: Sidecars::None,
            settle: Duration::ZERO,
            poll: Duration::ZERO,
            disposal: Disposal::Leave,
            events_queue: None,
        };
        let of = |uri: &str| place.profile(&uri.parse().expect("a URI")).map(|profile| profile.task);
        assert_eq!(of("s3://main/b/drop/sum/a//b.txt"), Ok(Task::Summarise));
        for none in ["s3://main/b/drop/sum", "s3://main/b/drop/summary/a", "s3://main/b/drop//sum/a"] {
            assert!(of(none).is_err(), "{none}");
        }
    }
}
