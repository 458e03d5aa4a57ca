//! What a group does next: which sequence begins, whose layer is taken, when all that generate take a step together.
//!
//! One context prefills at a time, first come, first served. A much shorter one may overtake it between two layers, for at most half of the
//! time; so a long document never holds up short ones, nor do they hold it up for ever. What generates takes a step at the latest when
//! prefills have taken [`Limits::stall`], as many as fit into a share of that time, and goes on without pause when no context can
//! begin. Memory is counted before it is taken.
//!
//! Invariant: pure. Bytes in use never exceed the budget; there is a step as long as there is a sequence; every sequence gets its turn.

use std::collections::VecDeque;
use std::time::Duration;

use super::command::SequenceId;

/// A context may overtake the one that prefills if its work is at most this part of what that one has left.
const OVERTAKER_PART: f64 = 0.25;

/// Time of steps, of the time of the prefills before them. Little, because a step costs much the same for few sequences as for many: the longer
/// those that have been prefilled wait, the more will share it.
const GENERATING_SHARE: f64 = 0.1;

/// How often later sequences may begin before one that still waits for memory; then they wait for it.
const PATIENCE: u32 = 8;

/// What a sequence takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Needs {
    /// Layers of its prefill.
    pub layers: usize,
    /// Operations of a layer of it, on the rank that has most.
    pub layer_flops: f64,
    /// Passes that its query takes after the last layer; 0 if it goes through the layers with the context.
    pub query_passes: usize,
    /// Bytes until it ends.
    pub kept_bytes: u64,
    /// Bytes until it is prefilled, beyond those.
    pub transient_bytes: u64,
}

/// What a group can do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Sequences at a time.
    pub at_once: usize,
    /// Time that prefills may take between two steps of what generates.
    pub stall: Duration,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The sequence begins.
    Begin(SequenceId),
    /// The next layer of its prefill.
    Layer(SequenceId),
    /// The next pass of its query.
    Query(SequenceId),
    /// A token for each.
    Generate(Vec<SequenceId>),
    /// The sequence does not fit, even alone.
    Refuse(SequenceId),
    /// There is nothing to do.
    Wait,
}

/// A sequence that has not been prefilled.
#[derive(Debug, Clone, Copy)]
struct Entry {
    id: SequenceId,
    needs: Needs,
    layers_done: usize,
    query_passes_done: usize,
    /// Sequences that came later and began before it, for want of memory.
    passed_over: u32,
}

impl Entry {
    fn flops_left(&self) -> f64 {
        self.needs.layer_flops * (self.needs.layers - self.layers_done) as f64
    }

    fn bytes(&self) -> u64 {
        self.needs.kept_bytes.saturating_add(self.needs.transient_bytes)
    }
}

/// The sequences of a group.
#[derive(Debug)]
pub struct Schedule {
    limits: Limits,
    waiting: VecDeque<Entry>,
    /// Contexts in their layers; the last one is worked on.
    prefilling: Vec<Entry>,
    /// What generates, with the bytes it keeps.
    generating: Vec<(SequenceId, u64)>,
    /// Operations a second of prefills; unknown before the first has ended.
    flops_per_s: Option<f64>,
    /// Seconds of a step of what generates; unknown before the first.
    step_s: Option<f64>,
    /// Operations of prefills since the last step of what generates.
    flops_since_step: f64,
    /// Seconds of steps that are due before the next layer.
    due_s: f64,
    /// Operations by which overtakers are ahead of the one they overtook.
    overtaken_flops: f64,
}

impl Schedule {
    /// Nothing to do yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            prefilling: Vec::new(),
            generating: Vec::new(),
            flops_per_s: None,
            step_s: None,
            flops_since_step: 0.0,
            due_s: 0.0,
            overtaken_flops: 0.0,
        }
    }

    /// A sequence has come.
    pub fn add(&mut self, id: SequenceId, needs: Needs) {
        self.waiting.push_back(Entry { id, needs, layers_done: 0, query_passes_done: 0, passed_over: 0 });
    }

    /// A sequence has ended, wherever it was.
    pub fn end(&mut self, id: SequenceId) {
        self.waiting.retain(|entry| entry.id != id);
        self.prefilling.retain(|entry| entry.id != id);
        self.generating.retain(|(of, _)| *of != id);
        if self.prefilling.len() < 2 && self.waiting.is_empty() {
            self.overtaken_flops = 0.0;
        }
    }

    /// A sequence that was told to begin could not get its memory after all: it waits again, before all others.
    pub fn put_back(&mut self, id: SequenceId) {
        if let Some(at) = self.prefilling.iter().position(|entry| entry.id == id) {
            let entry = self.prefilling.remove(at);
            // Whoever comes later has to wait for it now.
            self.waiting.push_front(Entry { passed_over: PATIENCE, ..entry });
        }
    }

    /// Prefills have been seen to run at this speed.
    pub fn learn(&mut self, flops_per_s: f64) {
        if flops_per_s.is_finite() && flops_per_s > 0.0 {
            self.flops_per_s = Some(self.flops_per_s.map_or(flops_per_s, |known| 0.7 * known + 0.3 * flops_per_s));
        }
    }

    /// A step of what generates has been seen to take so long.
    pub fn learn_step(&mut self, seconds: f64) {
        self.step_s = Some(self.step_s.map_or(seconds, |known| 0.7 * known + 0.3 * seconds));
    }

    /// Whether no sequence is there.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.is_idle()
    }

    /// Whether no sequence has begun.
    pub fn is_idle(&self) -> bool {
        self.prefilling.is_empty() && self.generating.is_empty()
    }

    /// Bytes that are taken.
    pub fn used_bytes(&self) -> u64 {
        let prefilling: u64 = self.prefilling.iter().map(Entry::bytes).sum();
        prefilling + self.generating.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// The next step, which is taken as done; `budget_bytes` is what all sequences together may take now.
    pub fn next(&mut self, budget_bytes: u64) -> Step {
        if !self.generating.is_empty() && (self.due_s > 0.0 || self.is_stalled()) {
            return self.generate();
        }
        if let Some(at) = self.to_begin(budget_bytes) {
            return self.begin(at);
        }
        match self.prefilling.last().copied() {
            Some(entry) => self.advance(&entry),
            None if !self.generating.is_empty() => self.generate(),
            None => match self.waiting.pop_front() {
                Some(entry) => Step::Refuse(entry.id),
                None => Step::Wait,
            },
        }
    }

    fn is_stalled(&self) -> bool {
        let Some(rate) = self.flops_per_s else { return self.flops_since_step > 0.0 };
        self.flops_since_step / rate >= self.limits.stall.as_secs_f64()
    }

    fn generate(&mut self) -> Step {
        let prefills_s = self.flops_per_s.map_or(0.0, |rate| self.flops_since_step / rate);
        self.flops_since_step = 0.0;
        // A step whose length is not known is the only one.
        let left_s = self.due_s + prefills_s * GENERATING_SHARE - self.step_s.unwrap_or(f64::INFINITY);
        self.due_s = left_s.max(0.0);
        Step::Generate(self.generating.iter().map(|(id, _)| *id).collect())
    }

    /// Which of those that wait may begin.
    fn to_begin(&self, budget_bytes: u64) -> Option<usize> {
        if self.prefilling.len() + self.generating.len() >= self.limits.at_once || self.prefilling.len() > 1 {
            return None;
        }
        let left = budget_bytes.saturating_sub(self.used_bytes());
        // Who has been passed over often enough is waited for.
        let patient = self.waiting.iter().take_while(|entry| entry.passed_over < PATIENCE).count();
        let mut reachable = self.waiting.iter().take(patient + 1).enumerate();
        let fits = |entry: &Entry| entry.bytes() <= left;
        let found = match self.prefilling.last() {
            None => reachable.find(|(_, entry)| fits(entry)),
            Some(_) if self.overtaken_flops > 0.0 => None,
            Some(worked_on) => {
                let short = worked_on.flops_left() * OVERTAKER_PART;
                reachable.find(|(_, entry)| fits(entry) && entry.flops_left() <= short)
            }
        };
        found.map(|(at, _)| at)
    }

    fn begin(&mut self, at: usize) -> Step {
        let is_overtaking = !self.prefilling.is_empty();
        if !is_overtaking {
            self.waiting.iter_mut().take(at).for_each(|entry| entry.passed_over += 1);
        }
        match self.waiting.remove(at) {
            Some(entry) => {
                self.prefilling.push(entry);
                Step::Begin(entry.id)
            }
            None => Step::Wait,
        }
    }

    /// The next layer of the context that is worked on, or a pass of its query.
    fn advance(&mut self, entry: &Entry) -> Step {
        let is_overtaker = self.prefilling.len() > 1;
        let Some(worked_on) = self.prefilling.last_mut() else { return Step::Wait };
        if entry.layers_done < entry.needs.layers {
            worked_on.layers_done += 1;
            self.flops_since_step += entry.needs.layer_flops;
            let sign = if is_overtaker { 1.0 } else { -1.0 };
            self.overtaken_flops = (self.overtaken_flops + sign * entry.needs.layer_flops).max(0.0);
            let is_last = worked_on.layers_done == entry.needs.layers;
            if is_last && entry.needs.query_passes == 0 {
                self.is_prefilled(entry);
            }
            return Step::Layer(entry.id);
        }
        worked_on.query_passes_done += 1;
        if worked_on.query_passes_done >= entry.needs.query_passes {
            self.is_prefilled(entry);
        }
        Step::Query(entry.id)
    }

    fn is_prefilled(&mut self, entry: &Entry) {
        self.prefilling.pop();
        self.generating.push((entry.id, entry.needs.kept_bytes));
    }
}

#[cfg(test)]
mod tests;
