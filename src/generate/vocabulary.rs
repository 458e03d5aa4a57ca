//! What generation needs of a tokenizer.
//!
//! Invariant: the same tokens always give the same text.

use super::constraint::{ConstraintError, TokenConstraint};

/// The text of tokens, and grammars over them.
pub trait Vocabulary: Send + Sync {
    /// Text of generated tokens, special tokens left out.
    fn text(&self, tokens: &[u32]) -> String;
    /// A constraint that allows the outputs which follow a JSON Schema, for logits of `rows` entries.
    fn constraint(&self, schema: &serde_json::Value, rows: usize) -> Result<Box<dyn TokenConstraint>, ConstraintError>;
}
