//! What a grammar has to offer to the choice of tokens.
//!
//! Invariant: a constraint sees the logits before the choice and every chosen token after it, in this order.

/// Why a constraint could not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The schema or grammar itself is not usable; the request can never work.
    #[error("the schema can not be used to constrain the output: {reason}")]
    Unusable { reason: String },
    /// The matcher gave up while generating: a limit was reached, or it was given a token it had forbidden.
    #[error("constrained decoding failed: {reason}")]
    Failed { reason: String },
}

/// Which tokens may come next, token by token.
pub trait TokenConstraint: Send {
    /// Sets the logits of the tokens that may not come next to negative infinity. `logits` has one entry a vocabulary row of
    /// the model, which may be more than the tokenizer knows; those are forbidden too. At least one token stays allowed.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError>;
    /// Takes the token that was chosen.
    fn commit(&mut self, token: u32) -> Result<(), ConstraintError>;
    /// Whether the output is complete, so that nothing but its end may follow.
    fn is_complete(&self) -> bool;
}
