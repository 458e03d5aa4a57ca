//! One group: the engine's schedule, and the time of each of its steps.
//!
//! Invariant: one step at a time; bytes are those that the schedule counts.

use std::collections::BTreeMap;

use super::profile::{Profile, Profiles};
use crate::cost::{GroupLoad, takes_up_to_s};
use crate::engine::SequenceId;
use crate::engine::schedule::{Limits, Schedule, Step};

/// A document in a group.
struct Sequence {
    profile: Profile,
    begun: bool,
    layers_left: usize,
    query_left: usize,
    /// Tokens that are still to be generated, the first one among them.
    tokens_left: usize,
    generated: usize,
}

impl Sequence {
    fn prefill_left_s(&self) -> f64 {
        self.layers_left as f64 * self.profile.layer_s + self.query_left as f64 * self.profile.query_pass_s
    }
}

/// A group of the pool.
pub struct Group {
    /// Devices.
    pub ranks: usize,
    limits: Limits,
    budget_bytes: u64,
    schedule: Schedule,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// What it does now, and the seconds that takes.
    step: Option<(Step, f64)>,
    /// Seconds in which it worked.
    pub busy_s: f64,
    /// Bytes that were taken at most.
    pub peak_bytes: u64,
    /// Documents that its schedule refused; there are none if only what fits is sent.
    pub refused: usize,
}

impl Group {
    /// An idle group.
    pub fn new(ranks: usize, limits: Limits, budget_bytes: u64) -> Self {
        Self {
            ranks,
            limits,
            budget_bytes,
            schedule: Schedule::new(limits),
            sequences: BTreeMap::new(),
            step: None,
            busy_s: 0.0,
            peak_bytes: 0,
            refused: 0,
        }
    }

    /// As routing sees it.
    pub fn load(&self) -> GroupLoad {
        let begun = |sequence: &&Sequence| sequence.begun && sequence.prefill_left_s() > 0.0;
        let running_s = self.sequences.values().filter(begun).map(Sequence::prefill_left_s).fold(0.0, f64::max);
        let waiting_s = self.sequences.values().filter(|sequence| !sequence.begun).map(Sequence::prefill_left_s);
        let has_room = self.sequences.len() < self.limits.at_once;
        GroupLoad {
            ranks: self.ranks,
            takes_up_to_s: if has_room { takes_up_to_s(running_s, waiting_s) } else { 0.0 },
            documents: self.sequences.len(),
            backlog_s: self.sequences.values().map(Sequence::prefill_left_s).sum(),
        }
    }

    /// Whether it does nothing now.
    pub fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// A document comes.
    pub fn add(&mut self, document: usize, profile: Profile, new_tokens: usize) {
        let (layers_left, query_left) = (profile.needs.layers, profile.needs.query_passes);
        let sequence =
            Sequence { profile, begun: false, layers_left, query_left, tokens_left: new_tokens.max(1), generated: 0 };
        let id = SequenceId(document as u64);
        self.sequences.insert(id, sequence);
        self.schedule.add(id, profile.needs);
    }

    /// Begins the next step; the seconds it takes, or `None` if there is nothing to do.
    pub fn begin(&mut self, profiles: &Profiles<'_>) -> Option<f64> {
        loop {
            let step = self.schedule.next(self.budget_bytes);
            self.peak_bytes = self.peak_bytes.max(self.schedule.used_bytes());
            let seconds = match &step {
                Step::Begin(id) => {
                    self.sequence(*id).begun = true;
                    continue;
                }
                Step::Refuse(id) => {
                    self.refused += 1;
                    self.sequences.remove(id);
                    continue;
                }
                Step::Wait => return None,
                Step::Layer(id) => self.sequences[id].profile.layer_s,
                Step::Query(id) => self.sequences[id].profile.query_pass_s,
                Step::Generate(ids) => self.generate_s(ids, profiles),
            };
            self.step = Some((step, seconds));
            return Some(seconds);
        }
    }

    /// Ends the step that was begun; the documents that are done by it.
    pub fn end(&mut self) -> Vec<usize> {
        let mut done = Vec::new();
        let Some((step, seconds)) = self.step.take() else { return done };
        self.busy_s += seconds;
        match step {
            Step::Layer(id) => {
                let sequence = self.sequence(id);
                sequence.layers_left -= 1;
                if sequence.layers_left == 0 {
                    let flops_per_s = sequence.profile.needs.layer_flops / sequence.profile.layer_s;
                    self.schedule.learn(flops_per_s);
                }
            }
            Step::Query(id) => {
                let sequence = self.sequence(id);
                sequence.query_left -= 1;
                if sequence.query_left == 0 {
                    self.token(id, &mut done);
                }
            }
            Step::Generate(ids) => ids.into_iter().for_each(|id| self.token(id, &mut done)),
            _ => {}
        }
        done
    }

    fn generate_s(&self, ids: &[SequenceId], profiles: &Profiles<'_>) -> f64 {
        let kept = |id: &SequenceId| (self.sequences[id].profile.kept_tokens + self.sequences[id].generated) as f64;
        profiles.model.batch_step_s(ids.len(), ids.iter().map(kept).sum(), self.ranks)
    }

    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("a sequence of the schedule is one of the group")
    }

    /// The sequence has one more token.
    fn token(&mut self, id: SequenceId, done: &mut Vec<usize>) {
        let sequence = self.sequence(id);
        sequence.generated += 1;
        sequence.tokens_left -= 1;
        if sequence.tokens_left == 0 {
            self.sequences.remove(&id);
            self.schedule.end(id);
            done.push(id.0 as usize);
        }
    }
}
