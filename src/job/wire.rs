//! The job on the wire, version 1, and the checks it has to pass.
//!
//! Invariant: what passes [`JobMessage::parse`] and [`JobMessage::check`] can be stored, sent and shown without another check, and gives the
//! same [`Job`] when it is read back.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Job;
use super::clean::{clean, needs_cleaning};
use super::digest::Digest;
use super::ids::{JobId, Priority};
use super::outcome::ErrorCode;
use super::source::{DocumentRef, DocumentUri};
use super::task::{Overflow, Task, TemplateId};
use crate::plan::{AttentionMode, AttentionRequest};

/// The version this program reads.
pub const VERSION: u32 = 1;

/// Bounds on a message, so that a hostile one costs little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageLimits {
    /// Bytes of the whole message.
    pub bytes: usize,
    /// Nested arrays and objects, the message itself included.
    pub depth: usize,
    /// Documents of one job.
    pub documents: usize,
    /// Characters of the instruction.
    pub instruction_chars: usize,
    /// Labels; each has at most 64 characters of key and 1024 of value.
    pub labels: usize,
    /// Generated tokens that may be asked for.
    pub max_new_tokens: u32,
}

impl Default for MessageLimits {
    fn default() -> Self {
        Self {
            bytes: 256 * 1024,
            depth: 32,
            documents: 64,
            instruction_chars: 16 * 1024,
            labels: 32,
            max_new_tokens: 65_536,
        }
    }
}

impl MessageLimits {
    /// No bounds: for a message that was checked when it came, perhaps under other limits.
    pub fn unbounded() -> Self {
        Self {
            bytes: usize::MAX,
            depth: usize::MAX,
            documents: usize::MAX,
            instruction_chars: usize::MAX,
            labels: usize::MAX,
            max_new_tokens: u32::MAX,
        }
    }
}

/// A job as producers write it; every key that is not here is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobMessage {
    /// [`VERSION`].
    pub version: u32,
    /// Identity; absent: the AMQP `message_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<JobId>,
    /// What to do.
    pub task: Task,
    /// With what.
    pub documents: Vec<DocumentMessage>,
    /// In the user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// `name@version`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// JSON Schema of the output, for `extract`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// Model of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Attention strategy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<AttentionMessage>,
    /// Generated tokens at most; absent: 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<u32>,
    /// Absent: 0, greedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Absent: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// `0..=9`, greater is sooner; absent: 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<DateTime<Utc>>,
    /// Absent: fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overflow: Option<Overflow>,
    /// The producer's own words.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A document as producers write it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentMessage {
    /// `s3://store-alias/bucket/key` or `file:///path`.
    pub uri: String,
    /// Version of the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
    /// Entity tag the bytes must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// `type/subtype`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
}

/// An attention strategy as producers write it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionMessage {
    /// Absent: auto.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ModeMessage>,
    /// Hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<u32>,
    /// Anchor length in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<u32>,
    /// Passing length in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passing: Option<u32>,
    /// Tokens of the context whose keys and values are kept after it has been read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_budget: Option<u32>,
}

/// `auto`, or the name of a strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModeMessage {
    /// Chosen from the length.
    Auto,
    /// Exact, one host.
    Full,
    /// Exact, several hosts.
    Ring,
    /// Exact, several hosts, each rank with some of the heads.
    Ulysses,
    /// Approximate, no passing blocks.
    Star,
    /// Approximate, with passing blocks.
    Apb,
}

/// Why a message is no job. The text names keys and limits, and quotes no values but short names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", reasons.join("; "))]
pub struct MessageError {
    /// `message_invalid` or `message_too_large`.
    pub code: ErrorCode,
    /// Everything that is wrong, not only the first thing.
    pub reasons: Vec<String>,
}

impl MessageError {
    fn invalid(reason: impl Into<String>) -> Self {
        Self { code: ErrorCode::MessageInvalid, reasons: vec![reason.into()] }
    }

    fn too_large(reason: String) -> Self {
        Self { code: ErrorCode::MessageTooLarge, reasons: vec![reason] }
    }
}

/// The version alone, so that a message of another version is refused for that and not for its keys.
#[derive(Deserialize)]
struct VersionOnly {
    version: Option<u32>,
}

impl JobMessage {
    /// A message with what every job has; the rest is absent.
    pub fn new(task: Task, documents: Vec<DocumentMessage>) -> Self {
        Self {
            version: VERSION,
            job_id: None,
            task,
            documents,
            instruction: None,
            template: None,
            schema: None,
            model: None,
            attention: None,
            max_new_tokens: None,
            temperature: None,
            seed: None,
            priority: None,
            deadline: None,
            overflow: None,
            labels: BTreeMap::new(),
        }
    }

    /// Reads a message of at most `limits.bytes` bytes and `limits.depth` levels.
    pub fn parse(bytes: &[u8], limits: &MessageLimits) -> Result<Self, MessageError> {
        if bytes.len() > limits.bytes {
            let reason = format!("the message has {} bytes, {} are allowed", bytes.len(), limits.bytes);
            return Err(MessageError::too_large(reason));
        }
        if depth(bytes) > limits.depth {
            return Err(MessageError::too_large(format!("the message is nested deeper than {} levels", limits.depth)));
        }
        // What is quoted of the message stays short: it may be text that belongs in no log.
        let read = |error: serde_json::Error| {
            let reason: String = clean(&error.to_string()).chars().take(200).collect();
            MessageError::invalid(reason)
        };
        let version = serde_json::from_slice::<VersionOnly>(bytes).map_err(read)?.version;
        match version {
            Some(VERSION) => serde_json::from_slice(bytes).map_err(read),
            Some(other) => {
                Err(MessageError::invalid(format!("version {other} is not known, this is version {VERSION}")))
            }
            None => Err(MessageError::invalid(format!("version is missing, this is version {VERSION}"))),
        }
    }

    /// Checks the message; `message_id` is the identity that came with it outside of its text.
    pub fn check(self, message_id: Option<JobId>, limits: &MessageLimits) -> Result<Job, MessageError> {
        let mut faults = Faults::default();
        let id = faults.require(self.job_id.or(message_id), "job_id and message_id are both missing");
        let documents = check_documents(&self.documents, limits, &mut faults);
        let template = match &self.template {
            Some(text) => faults.take("template", text.parse::<TemplateId>()),
            None => Some(self.task.default_template()),
        };
        let priority = faults.take("priority", self.priority.map_or(Ok(Priority::NORMAL), Priority::try_from));
        let attention = check_attention(self.attention.as_ref(), &mut faults);
        self.check_task(limits, &mut faults);
        self.check_numbers(limits, &mut faults);
        self.check_names(limits, &mut faults);
        let (Some(id), Some(template), Some(priority), true) = (id, template, priority, faults.0.is_empty()) else {
            return Err(MessageError { code: ErrorCode::MessageInvalid, reasons: faults.0 });
        };
        Ok(self.into_job(id, documents, template, priority, attention))
    }

    fn into_job(
        self,
        id: JobId,
        documents: Vec<DocumentRef>,
        template: TemplateId,
        priority: Priority,
        attention: AttentionRequest,
    ) -> Job {
        let payload_digest = self.payload_digest();
        let dirty = |text: &String| needs_cleaning(text);
        let text_cleaned = self.instruction.iter().chain(self.labels.values()).any(dirty);
        Job {
            id,
            task: self.task,
            documents,
            instruction: self.instruction.as_deref().map(|text| clean(text).into_owned()),
            template,
            schema: self.schema.clone(),
            model: self.model.clone(),
            attention,
            max_new_tokens: self.max_new_tokens.unwrap_or(512),
            temperature: self.temperature.unwrap_or(0.0),
            seed: self.seed.unwrap_or(0),
            priority,
            deadline: self.deadline,
            overflow: self.overflow.unwrap_or_default(),
            labels: self.labels.iter().map(|(name, text)| (name.clone(), clean(text).into_owned())).collect(),
            text_cleaned,
            payload_digest,
            message: Self { job_id: Some(id), ..self },
        }
    }

    /// Over the canonical form without the identity, which may come from outside of the text. Absent keys do not count, so a
    /// new optional key changes no digest.
    fn payload_digest(&self) -> Digest {
        let payload = Self { job_id: None, ..self.clone() };
        // Serialising plain data with string keys cannot fail; a message that did would conflict with every other.
        Digest::of_json(&serde_json::to_value(&payload).unwrap_or(Value::Null))
    }

    fn check_task(&self, limits: &MessageLimits, faults: &mut Faults) {
        let said = self.instruction.as_deref().is_some_and(|text| !clean(text).trim().is_empty());
        faults.refuse(self.task == Task::Ask && !said, "task ask needs an instruction");
        faults.refuse(self.task == Task::Extract && self.schema.is_none(), "task extract needs a schema");
        faults.refuse(self.task != Task::Extract && self.schema.is_some(), "schema is for task extract only");
        if let Some(schema) = &self.schema {
            faults.refuse(!schema.is_object(), "schema: expected a JSON object");
            faults.refuse(json_needs_cleaning(schema), "schema: control characters are not allowed");
        }
        let chars = self.instruction.as_deref().map_or(0, |text| text.chars().count());
        let bound = limits.instruction_chars;
        faults.refuse(chars > bound, format!("instruction: {chars} characters, {bound} are allowed"));
    }

    fn check_numbers(&self, limits: &MessageLimits, faults: &mut Faults) {
        let most = limits.max_new_tokens;
        let tokens = self.max_new_tokens.unwrap_or(1);
        faults.refuse(!(1..=most).contains(&tokens), format!("max_new_tokens: {tokens} is not in 1..{most}"));
        let temperature = self.temperature.unwrap_or(0.0);
        faults.refuse(!(0.0..=10.0).contains(&temperature), "temperature: not in 0..10");
        // Years outside of four digits have no RFC 3339 form.
        let far = |deadline: &DateTime<Utc>| !(0..=253_402_300_799).contains(&deadline.timestamp());
        faults.refuse(self.deadline.as_ref().is_some_and(far), "deadline: not between the years 1970 and 9999");
    }

    fn check_names(&self, limits: &MessageLimits, faults: &mut Faults) {
        faults.name("model", self.model.as_deref(), 256);
        let (count, bound) = (self.labels.len(), limits.labels);
        faults.refuse(count > bound, format!("labels: {count} labels, {bound} are allowed"));
        for (key, text) in &self.labels {
            faults.name("labels: a key", Some(key), 64);
            faults.refuse(text.chars().count() > 1024, "labels: a value has more than 1024 characters");
        }
    }
}

fn check_documents(documents: &[DocumentMessage], limits: &MessageLimits, faults: &mut Faults) -> Vec<DocumentRef> {
    let (count, bound) = (documents.len(), limits.documents);
    faults.refuse(count == 0, "documents: at least one is needed");
    faults.refuse(count > bound, format!("documents: {count} documents, {bound} are allowed"));
    let mut checked = Vec::with_capacity(count.min(bound));
    for (index, document) in documents.iter().take(bound).enumerate() {
        let at = |key: &str| format!("documents[{index}].{key}");
        let uri = faults.take(&at("uri"), document.uri.parse::<DocumentUri>());
        faults.name(&at("version_id"), document.version_id.as_deref(), 1024);
        faults.name(&at("etag"), document.etag.as_deref(), 1024);
        faults.name(&at("media_type"), document.media_type.as_deref(), 256);
        if let Some(uri) = uri {
            let DocumentMessage { version_id, etag, media_type, .. } = document.clone();
            checked.push(DocumentRef { uri, version_id, etag, media_type });
        }
    }
    checked
}

fn check_attention(message: Option<&AttentionMessage>, faults: &mut Faults) -> AttentionRequest {
    let Some(message) = message else { return AttentionRequest::default() };
    faults.refuse(message.hosts.is_some_and(|hosts| !(1..=4096).contains(&hosts)), "attention.hosts: not in 1..4096");
    let long = |tokens: Option<u32>| tokens.is_some_and(|tokens| tokens > 1 << 24);
    faults.refuse(long(message.anchor), "attention.anchor: more than 16777216 tokens");
    faults.refuse(long(message.passing), "attention.passing: more than 16777216 tokens");
    let is_budget = |tokens: u32| (1..=1 << 24).contains(&tokens);
    faults.refuse(!message.kv_budget.is_none_or(is_budget), "attention.kv_budget: not in 1..16777216 tokens");
    let mode = message.mode.and_then(|mode| match mode {
        ModeMessage::Auto => None,
        ModeMessage::Full => Some(AttentionMode::Full),
        ModeMessage::Ring => Some(AttentionMode::Ring),
        ModeMessage::Ulysses => Some(AttentionMode::Ulysses),
        ModeMessage::Star => Some(AttentionMode::Star),
        ModeMessage::Apb => Some(AttentionMode::Apb),
    });
    let size = |number: Option<u32>| number.map(|number| number as usize);
    AttentionRequest {
        mode,
        hosts: size(message.hosts),
        anchor: size(message.anchor),
        passing: size(message.passing),
        kv_budget: size(message.kv_budget),
        ..AttentionRequest::default()
    }
}

fn json_needs_cleaning(value: &Value) -> bool {
    match value {
        Value::String(text) => needs_cleaning(text),
        Value::Array(items) => items.iter().any(json_needs_cleaning),
        Value::Object(fields) => fields.iter().any(|(name, item)| needs_cleaning(name) || json_needs_cleaning(item)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Deepest nesting of arrays and objects in JSON text, found without building anything. Text that is not JSON gives some number.
fn depth(bytes: &[u8]) -> usize {
    let (mut level, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                level += 1;
                deepest = deepest.max(level);
            }
            b']' | b'}' if !in_string => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Collects what is wrong, so that a producer learns everything at once.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn refuse(&mut self, wrong: bool, reason: impl Into<String>) {
        if wrong {
            self.0.push(reason.into());
        }
    }

    fn require<T>(&mut self, value: Option<T>, reason: &str) -> Option<T> {
        self.refuse(value.is_none(), reason);
        value
    }

    fn take<T>(&mut self, key: &str, value: Result<T, String>) -> Option<T> {
        value.map_err(|reason| self.0.push(format!("{key}: {reason}"))).ok()
    }

    /// A name is not empty, has no control characters and at most `most` bytes.
    fn name(&mut self, key: &str, value: Option<&str>, most: usize) {
        let Some(value) = value else { return };
        let good = !value.is_empty() && value.len() <= most && !value.chars().any(char::is_control);
        self.refuse(!good, format!("{key}: expected 1 to {most} bytes without control characters"));
    }
}
