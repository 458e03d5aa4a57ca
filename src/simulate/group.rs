//! One group: the engine's schedule, and the time of each of its steps.
//!
//! Invariant: one step at a time; bytes are those that the schedule counts.

use std::collections::BTreeMap;

use super::profile::{Profile, Profiles};
use crate::engine::SequenceId;
use crate::engine::schedule::{Limits, Needs, Schedule, Step};

/// A document in a group.
struct Sequence {
    profile: Profile,
    layers_left: usize,
    query_left: usize,
    /// Tokens that are still to be generated, the first one among them.
    tokens_left: usize,
    generated: usize,
}

/// A step that begins.
pub struct Beginning {
    /// Seconds it takes.
    pub seconds: f64,
    /// Documents whose prefill began since the last step.
    pub began: Vec<usize>,
}

/// What a step that ended has brought.
#[derive(Default)]
pub struct Ending {
    /// Documents that have their last token.
    pub done: Vec<usize>,
    /// A document whose prefill went on, and the part of it that is done.
    pub prefilled: Option<(usize, f64)>,
}

/// A group of the pool.
pub struct Group {
    /// Devices.
    pub ranks: usize,
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
    pub refused: Vec<usize>,
}

impl Group {
    /// An idle group.
    pub fn new(ranks: usize, limits: Limits, budget_bytes: u64) -> Self {
        Self {
            ranks,
            budget_bytes,
            schedule: Schedule::new(limits),
            sequences: BTreeMap::new(),
            step: None,
            busy_s: 0.0,
            peak_bytes: 0,
            refused: Vec::new(),
        }
    }

    /// Whether it does nothing now.
    pub fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// A document comes.
    pub fn add(&mut self, document: usize, profile: Profile, new_tokens: usize) {
        let (layers_left, query_left) = (profile.needs.layers, profile.needs.query_passes);
        let sequence = Sequence { profile, layers_left, query_left, tokens_left: new_tokens.max(1), generated: 0 };
        let id = SequenceId(document as u64);
        self.sequences.insert(id, sequence);
        self.schedule.add(id, profile.needs);
    }

    /// Begins the next step, if there is anything to do.
    pub fn begin(&mut self, profiles: &Profiles<'_>) -> Option<Beginning> {
        let mut began = Vec::new();
        loop {
            let step = self.schedule.next(self.budget_bytes);
            self.peak_bytes = self.peak_bytes.max(self.schedule.used_bytes());
            let seconds = match &step {
                Step::Begin(id) => {
                    began.push(document(*id));
                    continue;
                }
                Step::Refuse(id) => {
                    self.refused.push(document(*id));
                    self.sequences.remove(id);
                    continue;
                }
                Step::Wait => return None,
                Step::Layer(id) => self.sequences[id].profile.layer_s,
                Step::Query(id) => self.sequences[id].profile.query_pass_s,
                Step::Generate(ids) => self.generate_s(ids, profiles),
            };
            self.step = Some((step, seconds));
            return Some(Beginning { seconds, began });
        }
    }

    /// Ends the step that was begun.
    pub fn end(&mut self) -> Ending {
        let mut ending = Ending::default();
        let Some((step, seconds)) = self.step.take() else { return ending };
        self.busy_s += seconds;
        match step {
            Step::Layer(id) => {
                let sequence = self.sequence(id);
                sequence.layers_left -= 1;
                let Needs { layers, layer_flops, .. } = sequence.profile.needs;
                let flops_per_s = layer_flops / sequence.profile.layer_s;
                ending.prefilled = Some((document(id), 1.0 - sequence.layers_left as f64 / layers as f64));
                if sequence.layers_left == 0 {
                    let has_query = sequence.query_left == 0;
                    self.schedule.learn(flops_per_s);
                    if has_query {
                        self.token(id, &mut ending.done);
                    }
                }
            }
            Step::Query(id) => {
                let sequence = self.sequence(id);
                sequence.query_left -= 1;
                if sequence.query_left == 0 {
                    self.token(id, &mut ending.done);
                }
            }
            Step::Generate(ids) => {
                self.schedule.learn_step(seconds);
                ids.into_iter().for_each(|id| self.token(id, &mut ending.done));
            }
            Step::Begin(_) | Step::Refuse(_) | Step::Wait => {}
        }
        ending
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
            done.push(document(id));
        }
    }
}

/// The document that a sequence is of.
fn document(id: SequenceId) -> usize {
    id.0 as usize
}
