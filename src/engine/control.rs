//! How the ranks stay together: whether to go on after a layer, and which token is next.
//!
//! The root asks its driver and broadcasts the answer, so that all ranks stop at the same place and the communicator stays
//! usable for the next prefill.
//!
//! Invariant: every rank makes the same calls in the same order; only the root's driver is ever asked.

use crate::backend::Backend;
use crate::comm::Comm;
use crate::generate::generator::Step;
use crate::generate::sampler::Choice;

use super::decode::Decoder;
use super::rank::{ROOT, Rank, RankError};
use super::{EngineError, Progress};

/// What the caller decides, asked on the root's thread.
pub trait Driver: Send {
    /// Between layers and tokens; `false` cancels.
    fn progress(&mut self, progress: Progress) -> bool;
    /// What follows from the logits of the last token, `[vocab]`.
    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError>;
    /// How the next token is chosen, if nothing but the logits decides on it: a device may then choose it, and [`Driver::take`] is asked.
    fn choice(&mut self) -> Option<Choice> {
        None
    }
    /// What follows from a token that was chosen by [`Driver::choice`]; asked instead of [`Driver::next`].
    fn take(&mut self, chosen: u32) -> Result<Step, EngineError> {
        Ok(Step::Continue(chosen))
    }
}

/// A rank's side of the agreement; the driver is there on the root alone.
pub(super) struct Control<'a> {
    driver: Option<&'a mut dyn Driver>,
    /// Tokens chosen so far, and at most.
    tokens: usize,
    at_most: usize,
}

const STOP: u64 = 0;
const GO_ON: u64 = 1;

impl<'a> Control<'a> {
    /// For a generation of `at_most` tokens.
    pub fn new(driver: Option<&'a mut dyn Driver>, at_most: usize) -> Self {
        Self { driver, tokens: 0, at_most }
    }

    /// Reports progress; all ranks return [`RankError::Cancelled`] if the caller does not want to go on.
    pub fn proceed<B: Backend, C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        progress: Progress,
    ) -> Result<(), RankError> {
        rank.backend.pace()?;
        let go_on = self.driver.as_mut().is_none_or(|driver| driver.progress(progress));
        match rank.comm.broadcast(ROOT, if go_on { GO_ON } else { STOP })? {
            STOP => Err(RankError::Cancelled),
            _ => Ok(()),
        }
    }

    /// The next token; all ranks get the same. `decoder` is asked on the root alone. Where the root fails or is cancelled,
    /// the others are told to stop.
    pub fn next<B: Backend, C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        decoder: &Decoder<'_, '_, B, C>,
    ) -> Result<Step, RankError> {
        if self.driver.is_none() {
            return Ok(match rank.comm.broadcast(ROOT, STOP)? {
                STOP => Step::Stop,
                token => Step::Continue((token - GO_ON) as u32),
            });
        }
        let step = self.choose(decoder);
        let word = match step {
            Ok(Step::Continue(token)) => GO_ON + u64::from(token),
            _ => STOP,
        };
        rank.comm.broadcast(ROOT, word)?;
        step
    }

    fn choose<B: Backend, C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        decoder: &Decoder<'_, '_, B, C>,
    ) -> Result<Step, RankError> {
        let Some(driver) = &mut self.driver else { return Ok(Step::Stop) };
        let chosen = match driver.choice() {
            Some(choice) => decoder.choose(&choice)?,
            None => None,
        };
        let step = match chosen {
            Some(token) => driver.take(token)?,
            // More than the logits decides, the device does not choose, or something is wrong with the logits: the driver says what.
            None => driver.next(&mut decoder.logits()?)?,
        };
        if let Step::Continue(_) = step {
            self.tokens += 1;
            if !driver.progress(Progress::Generate { tokens: self.tokens, at_most: self.at_most }) {
                return Err(RankError::Cancelled);
            }
        }
        Ok(step)
    }
}
