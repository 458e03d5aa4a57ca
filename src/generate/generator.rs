//! One generation: from logits to the next token or the end.
//!
//! Invariant: every token that is kept was allowed by the constraint and has been committed to it.

use super::constraint::{ConstraintError, TokenConstraint};
use super::sampler::{Choice, Sampler};
use super::stop::{Decode, StopStrings};
use super::{GenerationOptions, StopReason};

/// Why no token could be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The model's fault: nothing can be chosen from such logits.
    #[error("logit {index} of {count} is {value}")]
    NonFinite { index: usize, count: usize, value: f32 },
    /// The constraint left nothing to choose from.
    #[error("every token is forbidden after {tokens} tokens")]
    NothingAllowed { tokens: usize },
    /// The constraint failed.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
}

/// What follows from a row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// This token is next, and logits for the one after it are wanted.
    Continue(u32),
    /// Nothing more is wanted.
    Stop,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// Tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Their text, up to the stop string if one was found.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
}

/// Chooses tokens until something ends the output.
pub struct Generator<'a> {
    sampler: Sampler,
    at_most: usize,
    stop_tokens: &'a [u32],
    stop_strings: StopStrings<'a>,
    constraint: Option<Box<dyn TokenConstraint + 'a>>,
    decode: Decode<'a>,
    tokens: Vec<u32>,
    stopped_text: Option<String>,
    stop: StopReason,
}

impl<'a> Generator<'a> {
    /// `stop_tokens` are the model's, `decode` is its tokenizer's.
    pub fn new(
        options: &'a GenerationOptions,
        stop_tokens: &'a [u32],
        constraint: Option<Box<dyn TokenConstraint + 'a>>,
        decode: Decode<'a>,
    ) -> Self {
        Self {
            sampler: Sampler::new(options),
            at_most: options.max_new_tokens,
            stop_tokens,
            stop_strings: StopStrings::new(&options.stop, decode),
            constraint,
            decode,
            tokens: Vec::new(),
            stopped_text: None,
            stop: StopReason::Length,
        }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Chooses from the logits of the last token. They are masked in place.
    pub fn next(&mut self, logits: &mut [f32]) -> Result<Step, GenerateError> {
        if self.tokens.len() >= self.at_most {
            return Ok(self.end(StopReason::Length));
        }
        check(logits)?;
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        let nothing = GenerateError::NothingAllowed { tokens: self.tokens.len() };
        let token = self.sampler.choose(logits).ok_or(nothing)?;
        self.follow(token)
    }

    /// What the next token is chosen by, if nothing but the logits decides on it: then [`Generator::take`] will do.
    pub fn choice(&mut self) -> Option<Choice> {
        self.constraint.is_none().then(|| self.sampler.choice())
    }

    /// As [`Generator::next`], where somebody else has chosen by [`Generator::choice`], from finite logits.
    pub fn take(&mut self, chosen: u32) -> Result<Step, GenerateError> {
        if self.tokens.len() >= self.at_most {
            return Ok(self.end(StopReason::Length));
        }
        self.follow(chosen)
    }

    fn follow(&mut self, token: u32) -> Result<Step, GenerateError> {
        if self.stop_tokens.contains(&token) {
            return Ok(self.end(StopReason::EndOfText));
        }
        self.keep(token)
    }

    fn keep(&mut self, token: u32) -> Result<Step, GenerateError> {
        self.tokens.push(token);
        let mut grammar_complete = false;
        if let Some(constraint) = &mut self.constraint {
            constraint.commit(token)?;
            grammar_complete = constraint.is_complete();
        }
        if let Some(text) = self.stop_strings.found(&self.tokens) {
            self.stopped_text = Some(text.to_owned());
            return Ok(self.end(StopReason::StopString));
        }
        if grammar_complete {
            return Ok(self.end(StopReason::GrammarComplete));
        }
        if self.tokens.len() == self.at_most {
            return Ok(self.end(StopReason::Length));
        }
        Ok(Step::Continue(token))
    }

    fn end(&mut self, reason: StopReason) -> Step {
        self.stop = reason;
        Step::Stop
    }

    /// The tokens and their text.
    pub fn finish(self) -> Generated {
        let text = self.stopped_text.unwrap_or_else(|| (self.decode)(&self.tokens));
        Generated { text, tokens: self.tokens, stop: self.stop }
    }
}

fn check(logits: &[f32]) -> Result<(), GenerateError> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(index) => Err(GenerateError::NonFinite { index, count: logits.len(), value: logits[index] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Token `n` is the n-th letter.
    fn letters(tokens: &[u32]) -> String {
        tokens.iter().map(|token| char::from(b'a' + *token as u8)).collect()
    }

    fn logits_for(token: u32) -> Vec<f32> {
        (0..26).map(|id| if id == token { 1.0 } else { 0.0 }).collect()
    }

    fn generate(
        script: &[u32],
        options: &GenerationOptions,
        constraint: Option<Box<dyn TokenConstraint>>,
    ) -> Generated {
        let mut generator = Generator::new(options, &[25], constraint, &letters);
        for (index, token) in script.iter().enumerate() {
            match generator.next(&mut logits_for(*token)).unwrap() {
                Step::Continue(_) => assert!(index + 1 < script.len(), "never ended"),
                Step::Stop => return generator.finish(),
            }
        }
        generator.finish()
    }

    fn options(max_new_tokens: usize, stop: &[&str]) -> GenerationOptions {
        let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
        GenerationOptions { max_new_tokens, stop, ..GenerationOptions::default() }
    }

    #[test]
    fn a_stop_token_ends_the_output_and_is_not_in_it() {
        let out = generate(&[0, 1, 25, 2], &options(9, &[]), None);
        assert_eq!((out.tokens, out.text.as_str(), out.stop), (vec![0, 1], "ab", StopReason::EndOfText));
    }

    #[test]
    fn the_likeliest_token_is_as_good_as_its_logits() {
        let options = options(9, &["bc"]);
        let mut generator = Generator::new(&options, &[25], None, &letters);
        let greedy = generator.choice().unwrap();
        assert_eq!(greedy.temperature, 0.0);
        let steps = [0, 1, 2].map(|token| generator.take(token).unwrap());
        assert_eq!(steps, [Step::Continue(0), Step::Continue(1), Step::Stop]);
        assert_eq!(generator.finish(), generate(&[0, 1, 2], &options, None));
        assert_eq!(Generator::new(&options, &[], Some(Box::new(AThenB(0))), &letters).choice(), None);
        let warm = GenerationOptions { temperature: 0.5, ..options.clone() };
        let mut generator = Generator::new(&warm, &[], None, &letters);
        let draws = [0, 1].map(|_| generator.choice().unwrap().draw);
        assert!(draws[0] != draws[1] && draws.iter().all(|draw| (0.0..1.0).contains(draw)));
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it() {
        let out = generate(&[0, 1, 2, 3], &options(9, &["bc"]), None);
        assert_eq!((out.tokens.len(), out.text.as_str(), out.stop), (3, "a", StopReason::StopString));
    }

    #[test]
    fn the_limit_is_said() {
        for limit in [0, 2] {
            let out = generate(&[0, 1, 2], &options(limit, &[]), None);
            assert_eq!((out.tokens.len(), out.stop), (limit, StopReason::Length));
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_the_models_fault() {
        let options = options(4, &[]);
        let mut generator = Generator::new(&options, &[], None, &letters);
        let error = generator.next(&mut [0.0, f32::NAN]).unwrap_err();
        assert!(matches!(error, GenerateError::NonFinite { index: 1, count: 2, .. }), "{error}");
    }

    /// Allows `a`, then `b`, then nothing more.
    struct AThenB(u32);

    impl TokenConstraint for AThenB {
        fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
            let allowed = self.0 as usize;
            logits.iter_mut().enumerate().filter(|(id, _)| *id != allowed).for_each(|(_, l)| *l = f32::NEG_INFINITY);
            Ok(())
        }
        fn commit(&mut self, token: u32) -> Result<(), ConstraintError> {
            assert_eq!(token, self.0);
            self.0 += 1;
            Ok(())
        }
        fn is_complete(&self) -> bool {
            self.0 == 2
        }
    }

    #[test]
    fn a_constraint_decides_against_the_logits_and_ends_the_output() {
        let out = generate(&[7, 7, 7], &options(9, &[]), Some(Box::new(AThenB(0))));
        assert_eq!((out.text.as_str(), out.stop), ("ab", StopReason::GrammarComplete));
    }
}
