//! What a task asks of the model, in words. Versioned: a template that is in use never changes, a better one gets the next version.
//!
//! Invariant: the fixture model was trained on version 1 of each, to the letter.

use serde_json::Value;

use crate::job::{Task, TemplateId};

/// The instruction that follows the documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    text: String,
}

impl Instruction {
    /// What `task` asks for with this template: `words` are the user's own (the question, for `ask`), `schema` is that of an extraction.
    pub fn new(task: Task, template: &TemplateId, words: Option<&str>, schema: Option<&Value>) -> Result<Self, String> {
        if *template != task.default_template() {
            return Err(format!("there is no template {template} for {task}; {} is there", task.default_template()));
        }
        let words = words.map(str::trim).filter(|words| !words.is_empty());
        let text = match (task, words) {
            (Task::Ask, Some(question)) => format!("Answer from the document above: {question}"),
            (Task::Ask, None) => return Err("ask needs a question".to_owned()),
            (Task::Extract, words) => followed_by(extract(schema), words),
            (Task::Summarise, words) => followed_by("Summarise the document above as an outline.".to_owned(), words),
        };
        Ok(Self { text })
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

fn extract(schema: Option<&Value>) -> String {
    let fields = schema.and_then(|schema| schema["properties"].as_object()).map(|fields| fields.keys());
    let names: Vec<&str> = fields.into_iter().flatten().map(String::as_str).collect();
    match names.is_empty() {
        true => "Extract what the document above says as JSON.".to_owned(),
        false => format!("Extract these fields from the document above as JSON: {}.", names.join(", ")),
    }
}

fn followed_by(instruction: String, words: Option<&str>) -> String {
    words.map_or(instruction.clone(), |words| format!("{instruction} {words}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(task: Task, words: Option<&str>, schema: Option<&Value>) -> String {
        Instruction::new(task, &task.default_template(), words, schema).expect("a template").text
    }

    #[test]
    fn version_one_says_what_the_model_was_trained_on() {
        assert_eq!(text(Task::Ask, Some(" Who? "), None), "Answer from the document above: Who?");
        assert_eq!(text(Task::Summarise, None, None), "Summarise the document above as an outline.");
        let schema = json!({ "properties": { "owner": {}, "due_date": {} } });
        assert_eq!(
            text(Task::Extract, None, Some(&schema)),
            "Extract these fields from the document above as JSON: owner, due_date."
        );
    }

    #[test]
    fn a_users_words_follow() {
        assert!(text(Task::Summarise, Some("In French."), None).ends_with("outline. In French."));
    }

    #[test]
    fn other_templates_are_refused() {
        let other = TemplateId { name: "ask".to_owned(), version: 2 };
        let error = Instruction::new(Task::Ask, &other, Some("Who?"), None).expect_err("there is none");
        assert_eq!(error, "there is no template ask@2 for ask; ask@1 is there");
        assert!(Instruction::new(Task::Ask, &Task::Ask.default_template(), None, None).is_err());
    }
}
