//! What a rank holds of the sequences of its group, and how it obeys a command.
//!
//! Invariant: a sequence is either on its way through the layers or ready for tokens; memory for both is taken when it begins.

use std::collections::HashMap;

use crate::backend::{Backend, BackendError, Next, Wanted};
use crate::comm::Comm;

use super::command::{Command, Feed, OwnedJob, SequenceId};
use super::decode::{Decoder, Fed, Sequence};
use super::prefill::Prefill;
use super::rank::{Rank, RankError};

/// A rank at work.
pub(super) struct Member<'r, 'a, B: Backend, C> {
    rank: &'r Rank<'a, B, C>,
    decoder: Decoder<B>,
    prefilling: HashMap<SequenceId, Prefill<B>>,
    ready: HashMap<SequenceId, Sequence<B>>,
}

impl<'r, 'a, B: Backend, C: Comm<B::Matrix, B::Scores>> Member<'r, 'a, B, C> {
    /// A rank without sequences, with buffers for passes in which `at_once` of them generate.
    pub fn new(rank: &'r Rank<'a, B, C>, at_once: usize) -> Result<Self, RankError> {
        let decoder = Decoder::new(rank, at_once)?;
        Ok(Self { rank, decoder, prefilling: HashMap::new(), ready: HashMap::new() })
    }

    /// Takes part in a step.
    pub fn obey(&mut self, command: &Command) -> Result<(), RankError> {
        match command {
            Command::Begin { sequence, job } => self.begin(*sequence, job),
            Command::Layer { sequence } => self.layer(*sequence),
            Command::Append { feeds, gives_logits } => self.append(feeds, *gives_logits),
            Command::End { sequence } => {
                self.prefilling.remove(sequence);
                self.ready.remove(sequence);
                Ok(())
            }
        }
    }

    /// For each sequence of the last [`Command::Append`] that gave logits, or for the one whose query has gone through its last [`Command::Layer`], what is wanted of
    /// its last token's logits.
    pub fn next(&self, wanted: &[Wanted]) -> Result<Vec<Next>, RankError> {
        self.decoder.next(self.rank.backend, wanted)
    }

    fn begin(&mut self, sequence: SequenceId, job: &OwnedJob) -> Result<(), RankError> {
        self.prefilling.insert(sequence, Prefill::begin(self.rank, job)?);
        Ok(())
    }

    fn layer(&mut self, sequence: SequenceId) -> Result<(), RankError> {
        let prefill = self.prefilling.get_mut(&sequence).ok_or_else(|| unknown(sequence))?;
        let is_done = prefill.layer(self.rank, &mut self.decoder)?;
        match is_done {
            false => self.rank.backend.pace()?,
            // The layers' buffers are free for the next context once the device has come here.
            true => self.rank.backend.synchronize()?,
        }
        // Ranks that have less to do wait for this one: their deadline is for a few layers, not for all of a context.
        self.rank.comm.come_further();
        if is_done && let Some(prefill) = self.prefilling.remove(&sequence) {
            self.ready.insert(sequence, prefill.finish());
        }
        Ok(())
    }

    fn append(&mut self, feeds: &[Feed], gives_logits: bool) -> Result<(), RankError> {
        let take = |feed: &Feed| self.ready.remove(&feed.sequence).ok_or_else(|| unknown(feed.sequence));
        let mut sequences = feeds.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        let mut fed: Vec<Fed<'_, B>> =
            sequences.iter_mut().zip(feeds).map(|(sequence, feed)| (sequence, &feed.tokens[..])).collect();
        self.decoder.pass(self.rank, &mut fed)?;
        if gives_logits {
            self.decoder.give_logits(self.rank, feeds.len())?;
        }
        self.ready.extend(feeds.iter().map(|feed| feed.sequence).zip(sequences));
        Ok(())
    }
}

/// A command out of its order: a mistake of the root.
fn unknown(sequence: SequenceId) -> RankError {
    BackendError::Unavailable(format!("sequence {} is not where the command expects it", sequence.0)).into()
}
