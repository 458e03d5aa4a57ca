//! `NAME.job.json` beside `NAME`: keys of a job message that go before those of the profile.
//!
//! Invariant: it can say how its document is processed, never which document or job that is.

use serde_json::{Map, Value};

use crate::job::{JobMessage, MessageLimits};

/// Keys that follow from the document itself.
const NOT_ITS: [&str; 2] = ["documents", "job_id"];
/// Keys of the profile that belong to its task: another task does not inherit them.
const OF_THE_TASK: [&str; 3] = ["schema", "template", "instruction"];

/// The message of the profile with what the sidecar says.
pub(super) fn overlay(profile: JobMessage, text: &[u8], limits: &MessageLimits) -> Result<JobMessage, String> {
    let said: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| format!("the sidecar is no JSON object: {error}"))?;
    if let Some(key) = NOT_ITS.iter().find(|key| said.contains_key(**key)) {
        return Err(format!("the sidecar: {key} cannot be set there"));
    }
    let Ok(Value::Object(mut message)) = serde_json::to_value(&profile) else {
        return Err("the profile has no JSON form".to_owned());
    };
    if said.get("task").is_some_and(|task| message.get("task") != Some(task)) {
        OF_THE_TASK.iter().for_each(|key| drop(message.remove(*key)));
    }
    for (key, value) in said {
        match value {
            Value::Null => drop(message.remove(&key)),
            value => drop(message.insert(key, value)),
        }
    }
    let bytes = Value::Object(message).to_string();
    JobMessage::parse(bytes.as_bytes(), limits).map_err(|error| format!("the sidecar: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Task;

    fn with(text: &str) -> Result<JobMessage, String> {
        let mut profile = JobMessage::new(Task::Ask, Vec::new());
        (profile.instruction, profile.priority) = (Some("Who?".to_owned()), Some(7));
        overlay(profile, text.as_bytes(), &MessageLimits::default())
    }

    #[test]
    fn what_it_says_goes_before_the_profile() {
        let message = with(r#"{"instruction": "When?", "labels": {"a": "b"}, "priority": null}"#).expect("a message");
        assert_eq!((message.task, message.instruction.as_deref(), message.priority), (Task::Ask, Some("When?"), None));
        assert_eq!(message.labels["a"], "b");
        let other = with(r#"{"task": "summarise"}"#).expect("a message");
        assert_eq!((other.task, other.instruction, other.priority), (Task::Summarise, None, Some(7)));
    }

    #[test]
    fn what_is_not_its_to_say_is_refused() {
        let odd = [r#"{"documents": []}"#, r#"{"job_id": "x"}"#, r#"{"unknown": 1}"#, "[]", "{", r#"{"version": 2}"#];
        odd.iter().for_each(|text| assert!(with(text).is_err(), "{text}"));
    }
}
