//! `tokenizer.json`: text to tokens and back.
//!
//! Invariant: text of a document or a user never becomes a special token; only the chat template's own text does. However long a document is,
//! tokenizing it needs memory for its tokens and one piece of it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::generate::constraint::{ConstraintError, TokenConstraint};
use crate::generate::grammar::Grammar;
use crate::generate::vocabulary::Vocabulary;
use crate::model::pieces::pieces;

/// Bytes of text that are tokenized at once. The tokenizer keeps some forty bytes for each of them meanwhile, and a hundred for each token.
const PIECE_BYTES: usize = 256 * 1024;

/// Text with what a cut could harm: lines, indents, words, numbers, other scripts.
const PROBE: &str = "One line, with words.\nAnother: 1234 of it\n\n  indented, \tand more words\nété größer 漢字 слово\n- the end of it all";

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is missing or wrong.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// Text or tokens it could not deal with.
    #[error("tokenizer: {0}")]
    Failed(String),
}

/// A tokenizer in two settings: one that recognises special tokens in text, one that does not.
pub struct Tokenizer {
    plain: tokenizers::Tokenizer,
    special: tokenizers::Tokenizer,
    grammar: Grammar,
    /// Bytes that are tokenized at once: no bound for a tokenizer that gives other tokens then (one without a pre-tokenizer of words).
    piece_bytes: usize,
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory.
    pub fn load(directory: &Path) -> Result<Self, TokenizerError> {
        let path = directory.join("tokenizer.json");
        let failed = |reason: String| TokenizerError::File { path: path.clone(), reason };
        let bytes = fs::read(&path).map_err(|error| failed(error.to_string()))?;
        let mut special = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| failed(error.to_string()))?;
        // The file may ask for cutting or padding, which was meant for training.
        special.with_truncation(None).map_err(|error| failed(error.to_string()))?.with_padding(None);
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        let content: Value = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
        let grammar = Grammar::new(&content, &end_tokens(&special));
        let mut tokenizer = Self { plain, special, grammar, piece_bytes: usize::MAX };
        if tokenizer.bears_cuts()? {
            tokenizer.piece_bytes = PIECE_BYTES;
        }
        Ok(tokenizer)
    }

    /// Whether the tokens of pieces are those of the whole.
    fn bears_cuts(&self) -> Result<bool, TokenizerError> {
        let whole = encode(&self.plain, PROBE)?;
        for at_most in [28, 32, 40, 64] {
            if encode_pieces(&self.plain, PROBE, at_most)? != whole {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tokens of text that is only text: nothing in it is special, nothing is added to it.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode_pieces(&self.plain, text, self.piece_bytes)
    }

    /// Tokens of text of the chat template, special tokens recognised. Nothing is added: the template says all.
    pub fn encode_template(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.special, text)
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.special.decode(tokens, true).map_err(|error| TokenizerError::Failed(error.to_string()))
    }

    /// Whether a token is a special one.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.get_added_tokens_decoder().get(&token).is_some_and(|token| token.special)
    }
}

/// Special tokens that end a turn or a text in the families that are supported; a grammar may end with any of them.
fn end_tokens(tokenizer: &tokenizers::Tokenizer) -> Vec<u32> {
    let names = ["<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>"];
    names.iter().filter_map(|name| tokenizer.token_to_id(name)).collect()
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|error| TokenizerError::Failed(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

fn encode_pieces(tokenizer: &tokenizers::Tokenizer, text: &str, at_most: usize) -> Result<Vec<u32>, TokenizerError> {
    let mut tokens = Vec::new();
    for piece in pieces(text, at_most) {
        tokens.extend(encode(tokenizer, piece)?);
    }
    Ok(tokens)
}

impl Vocabulary for Tokenizer {
    fn text(&self, tokens: &[u32]) -> String {
        // A model with more vocabulary rows than its tokenizer can choose a token that has no text.
        self.decode(tokens).unwrap_or_default()
    }

    fn constraint(&self, schema: &Value, rows: usize) -> Result<Box<dyn TokenConstraint>, ConstraintError> {
        Ok(Box::new(self.grammar.constraint(schema, rows)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixture() -> Tokenizer {
        Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")).expect("the fixture model")
    }

    #[test]
    fn only_template_text_has_special_tokens() {
        let tokenizer = fixture();
        assert_eq!(tokenizer.encode_template("<|eot_id|>").expect("text"), [4]);
        let plain = tokenizer.encode_plain("a<|eot_id|>b").expect("text");
        assert!(!plain.iter().any(|&token| tokenizer.is_special(token)), "{plain:?}");
        assert_eq!(tokenizer.decode(&plain).expect("tokens"), "a<|eot_id|>b");
        assert_eq!(tokenizer.decode(&[4]).expect("tokens"), "");
    }

    #[test]
    fn a_document_in_pieces_has_the_tokens_of_the_whole() {
        let tokenizer = fixture();
        assert_eq!(tokenizer.piece_bytes, PIECE_BYTES);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/documents/ownership.md");
        let text = fs::read_to_string(path).expect("a document");
        let whole = encode(&tokenizer.plain, &text).expect("text");
        for at_most in [100, 1000, 10_000] {
            assert_eq!(encode_pieces(&tokenizer.plain, &text, at_most).expect("text"), whole, "{at_most}");
        }
    }

    #[test]
    fn a_directory_without_a_tokenizer_is_named() {
        let error = Tokenizer::load(Path::new("/nowhere")).err().expect("nothing there").to_string();
        assert!(error.contains("/nowhere/tokenizer.json"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn hostile_text_comes_back_as_it_was(parts in prop::collection::vec(prop_oneof![
            Just("<|eot_id|>".to_owned()), Just("<|start_header_id|>".to_owned()), Just("<|".to_owned()), any::<String>(),
        ], 0..8)) {
            thread_local!(static TOKENIZER: Tokenizer = fixture());
            let text = parts.concat();
            TOKENIZER.with(|tokenizer| {
                let tokens = tokenizer.encode_plain(&text).expect("text");
                prop_assert!(!tokens.iter().any(|&token| tokenizer.is_special(token)));
                prop_assert_eq!(tokenizer.decode(&tokens).expect("tokens"), text);
                Ok(())
            })?;
        }
    }
}
