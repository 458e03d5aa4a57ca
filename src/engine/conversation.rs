//! What a group and the caller of one of its sequences say to each other: the group's root tells of progress and brings what the model
//! gave, the caller answers what is next. Callers of a batch think side by side, each on its own thread.
//!
//! Invariant: one answer follows each [`Told::Next`]; nothing is asked of a caller that does not want to go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::backend::{Next, Wanted};
use crate::generate::generator::Step;
use crate::generate::sampler::Choice;

use super::{EngineError, Progress};

/// What the caller decides, asked on its own thread.
pub trait Driver {
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

/// How long an inference took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// Context and query through all layers, on all ranks, until the first token could be chosen; what others did meanwhile included.
    pub prefill: Duration,
    /// Generated tokens, likewise.
    pub generate: Duration,
}

/// From the root.
enum Told {
    Progress(Progress),
    Next(Next),
    Ended(Result<Timing, EngineError>),
}

/// From the caller.
pub(super) struct Answer {
    /// What is next.
    pub step: Result<Step, EngineError>,
    /// What will be wanted of the logits after it.
    pub wanted: Wanted,
}

/// The root's end.
pub(super) struct ToCaller {
    told: Sender<Told>,
    answers: Receiver<Answer>,
    cancelled: Arc<AtomicBool>,
    /// What is wanted of the next logits.
    pub wanted: Wanted,
}

/// The caller's end.
pub(super) struct ToRoot {
    told: Receiver<Told>,
    answers: Sender<Answer>,
    cancelled: Arc<AtomicBool>,
    at_most: usize,
}

/// How a conversation ended for the caller.
pub(super) enum Outcome {
    /// As the root said.
    Ended(Result<Timing, EngineError>),
    /// The group went away before; whether the sequence had begun.
    Gone { had_begun: bool },
}

/// Both ends, for a generation of `at_most` tokens.
pub(super) fn open(driver: &mut dyn Driver, at_most: usize) -> (ToCaller, ToRoot) {
    let ((tell, told), (answer, answers)) = (channel(), channel());
    let cancelled = Arc::new(AtomicBool::new(false));
    let to_caller = ToCaller { told: tell, answers, cancelled: cancelled.clone(), wanted: wanted(driver) };
    (to_caller, ToRoot { told, answers: answer, cancelled, at_most })
}

fn wanted(driver: &mut dyn Driver) -> Wanted {
    driver.choice().map_or(Wanted::Logits, |choice| Wanted::Token((choice.temperature, choice.top_p, choice.draw)))
}

impl ToCaller {
    /// Tells how far it is. A caller that went away is noticed when it is asked.
    pub fn progress(&self, progress: Progress) {
        let _ = self.told.send(Told::Progress(progress));
    }

    /// Brings what the model gave; [`ToCaller::answer`] is called next.
    pub fn bring(&self, next: Next) {
        let _ = self.told.send(Told::Next(next));
    }

    /// What the caller made of it; a caller that went away wants nothing more.
    pub fn answer(&mut self) -> Result<Step, EngineError> {
        let Ok(Answer { step, wanted }) = self.answers.recv() else { return Err(EngineError::Cancelled) };
        self.wanted = wanted;
        step
    }

    /// Whether the caller does not want to go on.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The last word.
    pub fn end(self, result: Result<Timing, EngineError>) {
        let _ = self.told.send(Told::Ended(result));
    }
}

impl ToRoot {
    /// Holds the conversation to its end.
    pub fn converse(self, driver: &mut dyn Driver) -> Outcome {
        let (mut had_begun, mut tokens) = (false, 0);
        loop {
            match self.told.recv() {
                Ok(Told::Progress(progress)) => {
                    had_begun = true;
                    self.report(driver, progress);
                }
                Ok(Told::Next(next)) => {
                    let step = self.follow(driver, next, &mut tokens);
                    let wanted = if matches!(step, Ok(Step::Continue(_))) { wanted(driver) } else { Wanted::Logits };
                    let _ = self.answers.send(Answer { step, wanted });
                }
                Ok(Told::Ended(result)) => return Outcome::Ended(result),
                Err(_) => return Outcome::Gone { had_begun },
            }
        }
    }

    /// Reports progress to a caller that still wants to hear of it; `false` if it does not want to go on.
    fn report(&self, driver: &mut dyn Driver, progress: Progress) -> bool {
        let goes_on = !self.cancelled.load(Ordering::Relaxed) && driver.progress(progress);
        if !goes_on {
            self.cancelled.store(true, Ordering::Relaxed);
        }
        goes_on
    }

    fn follow(&self, driver: &mut dyn Driver, next: Next, tokens: &mut usize) -> Result<Step, EngineError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(EngineError::Cancelled);
        }
        let step = match next {
            Next::Token(token) => driver.take(token)?,
            Next::Logits(mut logits) => driver.next(&mut logits)?,
        };
        if let Step::Continue(_) = step {
            *tokens += 1;
            if !self.report(driver, Progress::Generate { tokens: *tokens, at_most: self.at_most }) {
                return Err(EngineError::Cancelled);
            }
        }
        Ok(step)
    }
}
