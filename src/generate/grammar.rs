//! Outputs that follow a JSON Schema, token by token, by `llguidance`.
//!
//! Objects are written on one line with one space after colons and commas, as models are used to and as is cheapest in tokens.
//!
//! Invariant: a token that a mask allowed can be committed; the output of a constraint that says it is complete parses as JSON.

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use super::constraint::{ConstraintError, TokenConstraint};

/// Levels of nesting in a schema.
const SCHEMA_DEPTH_AT_MOST: usize = 32;
/// Values (objects, lists and plain ones) in a schema.
const SCHEMA_VALUES_AT_MOST: usize = 10_000;

/// A vocabulary for which grammars can be compiled.
pub struct Grammar {
    /// Absent, with the reason, for tokenizers whose tokens are no runs of bytes.
    factory: Result<ParserFactory, String>,
}

impl Grammar {
    /// `tokenizer` is the content of a `tokenizer.json`; `stop_tokens` may end an output that is complete but could go on.
    pub fn new(tokenizer: &Value, stop_tokens: &[u32]) -> Self {
        Self { factory: factory(tokenizer, stop_tokens) }
    }

    /// A constraint for logits of `rows` entries.
    pub fn constraint(&self, schema: &Value, rows: usize) -> Result<SchemaConstraint, ConstraintError> {
        let unusable = |reason: String| ConstraintError::Unusable { reason };
        let factory = self.factory.as_ref().map_err(|reason| unusable(reason.clone()))?;
        check_size(schema).map_err(unusable)?;
        let grammar = TopLevelGrammar::from_json_schema(on_one_line(schema));
        let parser = factory.create_parser(grammar).map_err(|error| unusable(first_line(&error.to_string())))?;
        let mut matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(unusable(first_line(&error))),
            None => {
                // A schema that allows nothing shows at the first mask.
                matcher.compute_mask().map_err(|error| unusable(first_line(&error.to_string())))?;
                Ok(SchemaConstraint { matcher, rows })
            }
        }
    }
}

fn factory(tokenizer: &Value, stop_tokens: &[u32]) -> Result<ParserFactory, String> {
    let words = token_bytes_from_tokenizer_json(tokenizer)
        .map_err(|error| format!("this model's tokenizer can not be constrained: {error}"))?;
    let first_stop = stop_tokens.first().copied().unwrap_or(0);
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first_stop), &words);
    let known: Vec<u32> = stop_tokens.iter().copied().filter(|&token| (token as usize) < words.len()).collect();
    let trie = if known.is_empty() { trie } else { trie.with_eos_tokens(&known) };
    let environment: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    // Its messages would go to stderr past our log.
    factory.quiet();
    Ok(factory)
}

/// The schema with its layout fixed. A layout of its own in the schema would be an instruction to the compiler, not to the output.
fn on_one_line(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(fields) = &mut schema {
        let layout = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
        fields.insert("x-guidance".to_owned(), layout);
    }
    schema
}

fn check_size(schema: &Value) -> Result<(), String> {
    let mut values = 0;
    let mut left = vec![(schema, 1)];
    while let Some((value, depth)) = left.pop() {
        values += 1;
        if depth > SCHEMA_DEPTH_AT_MOST {
            return Err(format!("it is nested more than {SCHEMA_DEPTH_AT_MOST} levels deep"));
        }
        if values > SCHEMA_VALUES_AT_MOST {
            return Err(format!("it has more than {SCHEMA_VALUES_AT_MOST} values"));
        }
        match value {
            Value::Object(fields) => left.extend(fields.values().map(|value| (value, depth + 1))),
            Value::Array(items) => left.extend(items.iter().map(|value| (value, depth + 1))),
            _ => {}
        }
    }
    Ok(())
}

/// The rest of these messages is the grammar and the tokens so far, which may be text of a document.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

/// A schema being followed.
pub struct SchemaConstraint {
    matcher: Matcher,
    rows: usize,
}

impl TokenConstraint for SchemaConstraint {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        debug_assert_eq!(logits.len(), self.rows);
        let allowed = self.matcher.compute_mask_or_eos().map_err(failed)?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn commit(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token).map_err(failed)
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }
}

fn failed(error: impl std::fmt::Display) -> ConstraintError {
    ConstraintError::Failed { reason: first_line(&error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte a token; token 256 ends the output.
    fn bytes_vocabulary() -> Grammar {
        let mut vocab = serde_json::Map::new();
        // The byte-level alphabet: printable bytes stand for themselves, the others are moved up.
        let mut moved = 0x100;
        for byte in 0..=255_u8 {
            let plain = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let c = if plain { char::from(byte) } else { char::from_u32(moved).expect("a character") };
            moved += u32::from(!plain);
            vocab.insert(c.to_string(), Value::from(byte));
        }
        let added = json!([{ "id": 256, "content": "<end>", "special": true }]);
        let tokenizer =
            json!({ "decoder": { "type": "ByteLevel" }, "model": { "vocab": vocab }, "added_tokens": added });
        Grammar::new(&tokenizer, &[256])
    }

    /// Commits the bytes of `text` as long as they are allowed; the number of them, and whether the output is complete then.
    fn follow(schema: &Value, text: &str) -> (usize, bool) {
        let mut constraint = bytes_vocabulary().constraint(schema, 300).expect("a usable schema");
        for (i, byte) in text.bytes().enumerate() {
            let mut logits = vec![0.0; 300];
            constraint.mask(&mut logits).expect("a mask");
            assert!(logits[257..].iter().all(|&logit| logit == f32::NEG_INFINITY), "rows without a token");
            if logits[byte as usize] == f32::NEG_INFINITY {
                return (i, constraint.is_complete());
            }
            constraint.commit(byte.into()).expect("an allowed token");
        }
        (text.len(), constraint.is_complete())
    }

    fn record() -> Value {
        json!({
            "type": "object", "properties": { "name": { "type": "string" }, "age": { "type": "integer" } },
            "required": ["name", "age"], "additionalProperties": false
        })
    }

    #[test]
    fn an_object_on_one_line_is_followed_to_its_end() {
        let text = r#"{"name": "Ada", "age": 36}"#;
        assert_eq!(follow(&record(), text), (text.len(), true));
    }

    #[test]
    fn what_breaks_the_schema_is_forbidden_where_it_breaks_it() {
        assert_eq!(follow(&record(), r#"{"name": "Ada", "city""#), (17, false));
        assert_eq!(follow(&record(), r#"{"name": 7"#), (9, false));
        assert_eq!(follow(&record(), "Sure! "), (0, false));
        assert_eq!(follow(&record(), "{\n"), (1, false));
    }

    #[test]
    fn unusable_schemas_are_refused_with_a_reason() {
        let refused = |schema: &Value| match bytes_vocabulary().constraint(schema, 300) {
            Err(ConstraintError::Unusable { reason }) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted"),
        };
        assert!(refused(&json!({ "type": "nonsense" })).contains("nonsense"));
        let deep = (0..50).fold(json!({ "type": "string" }), |inner, _| json!({ "type": "array", "items": inner }));
        assert!(refused(&deep).contains("levels deep"));
    }
}
