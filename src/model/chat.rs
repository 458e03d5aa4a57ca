//! The chat template of a model: what stands around a user's turn.
//!
//! Templates are Jinja programs from a model's directory; they are rendered by a maintained engine, with the functions that Hugging Face gives them.
//!
//! Invariant: a template is rendered once, at start, around a marker; documents and instructions never pass through it.

use std::fs;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

/// Stands for the user's text while the template is rendered.
const MARKER: &str = "\u{e000}apbd\u{e001}";

/// Why a chat template could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct ChatTemplateError {
    path: PathBuf,
    reason: String,
}

/// The text around a user's turn, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatFrame {
    /// From the start of the conversation to the user's text.
    pub before: String,
    /// From the user's text to where the model's answer begins.
    pub after: String,
}

impl ChatFrame {
    /// The frame of the model in `directory`. A model without a chat template continues text: its frame is its BOS token and a blank line.
    pub fn load(directory: &Path) -> Result<Self, ChatTemplateError> {
        let path = directory.join("tokenizer_config.json");
        let config = if path.is_file() { read_json(&path)? } else { Value::Null };
        let file = directory.join("chat_template.jinja");
        let template = match file.is_file() {
            true => Some((read(&file)?, file)),
            false => template_of(&config).map(|template| (template, path)),
        };
        let token = |name: &str| token_text(&config[name]);
        match template {
            Some((template, path)) => render(&template, &token("bos_token"), &token("eos_token"))
                .map_err(|reason| ChatTemplateError { path, reason }),
            None => Ok(Self { before: token("bos_token"), after: "\n\n".to_owned() }),
        }
    }
}

fn read(path: &Path) -> Result<String, ChatTemplateError> {
    fs::read_to_string(path).map_err(|error| ChatTemplateError { path: path.to_owned(), reason: error.to_string() })
}

fn read_json(path: &Path) -> Result<Value, ChatTemplateError> {
    let failed = |error: serde_json::Error| ChatTemplateError { path: path.to_owned(), reason: error.to_string() };
    serde_json::from_str(&read(path)?).map_err(failed)
}

/// One template, or the one called `default` of a list.
fn template_of(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|one| one["name"] == "default").or(named.first());
            default.and_then(|one| one["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    }
}

/// A token is given as its text or as an object that has it.
fn token_text(token: &Value) -> String {
    token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
}

fn render(template: &str, bos: &str, eos: &str) -> Result<ChatFrame, String> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| error.to_string())?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| chrono::Local::now().format(&format).to_string());
    let messages = [context! { role => "user", content => MARKER }];
    let values = context! { messages, bos_token => bos, eos_token => eos, add_generation_prompt => true };
    let text =
        environment.render_str(template, values).map_err(|error| format!("the chat template failed: {error}"))?;
    match text.split(MARKER).collect::<Vec<_>>()[..] {
        [before, after] => Ok(ChatFrame { before: before.to_owned(), after: after.to_owned() }),
        ref parts => Err(format!("the chat template shows the user's text {} times, not once", parts.len() - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(template: &str) -> Result<ChatFrame, String> {
        render(template, "<s>", "</s>")
    }

    #[test]
    fn the_fixture_model_has_the_frame_it_was_trained_with() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model");
        let frame = ChatFrame::load(&directory).expect("loads");
        assert_eq!(frame.before, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n");
        assert_eq!(frame.after, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
    }

    #[test]
    fn published_idioms_are_understood() {
        // As Qwen writes it: a system message of its own, python methods, tests on keys.
        let qwen = "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}\
            {{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}\
            {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + '<|im_end|>' + '\\n' }}{%- endfor %}\
            {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
        let frame = frame(qwen).expect("renders");
        assert_eq!(frame.before, "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n");
        assert_eq!(frame.after, "<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn templates_that_can_not_be_used_are_refused() {
        assert!(frame("{{ raise_exception('only tools') }}").expect_err("raised").contains("only tools"));
        assert!(frame("{{ messages[0].content }}{{ messages[0].content }}").expect_err("twice").contains("2 times"));
        assert!(frame("{% if %}").is_err());
    }

    #[test]
    fn a_model_without_a_template_continues_text() {
        let directory = tempfile::TempDir::new().expect("a temporary directory");
        let config = r#"{"bos_token": {"content": "<s>", "special": true}}"#;
        fs::write(directory.path().join("tokenizer_config.json"), config).expect("written");
        let frame = ChatFrame::load(directory.path()).expect("loads");
        assert_eq!((frame.before.as_str(), frame.after.as_str()), ("<s>", "\n\n"));
    }
}
