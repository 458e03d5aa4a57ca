//! The pool: documents come, wait, are sent to groups, and are done.
//!
//! Invariant: time never goes back; a document that waits is asked for before one that came later.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use super::group::Group;
use super::layout::Layout;
use super::mix::{Arrivals, Mix};
use super::outcome::{Done, Outcome};
use super::profile::Profiles;
use crate::cost::{Destination, place};
use crate::engine::schedule::Limits;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SimulationOptions {
    /// Documents.
    pub documents: usize,
    /// When they come.
    pub arrivals: Arrivals,
    /// Tokens that are generated for each.
    pub new_tokens: usize,
    /// How groups share their time.
    pub limits: Limits,
    /// Of all that is random.
    pub seed: u64,
}

/// The end of a group's step.
#[derive(Debug, Clone, Copy, PartialEq)]
struct StepEnd {
    at_s: f64,
    group: usize,
}

impl Eq for StepEnd {}

impl Ord for StepEnd {
    /// The earliest is the greatest: a heap gives it first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at_s.total_cmp(&self.at_s).then(other.group.cmp(&self.group))
    }
}

impl PartialOrd for StepEnd {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A pool while it is simulated.
pub struct Simulation<'a> {
    profiles: &'a Profiles<'a>,
    options: SimulationOptions,
    groups: Vec<Group>,
    /// Part of the mix and time of coming, of each document.
    documents: Vec<(usize, f64)>,
    /// Of each part of the mix, what it takes in each group.
    seconds: Vec<Vec<Option<f64>>>,
    /// Documents that wait, of each part of the mix.
    waiting: Vec<VecDeque<usize>>,
    ends: BinaryHeap<StepEnd>,
    done: Vec<Done>,
    refused: usize,
    now_s: f64,
    /// Moments at which a group had nothing to do beside a document that fits it.
    idle_beside_work: usize,
    /// When the last of the waiting was sent to a group, and what the groups had worked by then.
    drained: Option<(f64, f64, usize)>,
}

impl<'a> Simulation<'a> {
    /// Runs a pool until all documents are done.
    pub fn run(layout: &Layout, mix: &Mix, profiles: &'a Profiles<'a>, options: SimulationOptions) -> Outcome {
        let group = |ranks: &usize| Group::new(*ranks, options.limits, profiles.budget_bytes(*ranks));
        let seconds = |part| {
            let of_group = |ranks: &usize| profiles.get(*ranks, part).map(super::Profile::prefill_s);
            layout.groups.iter().map(of_group).collect()
        };
        let mut simulation = Self {
            profiles,
            options,
            groups: layout.groups.iter().map(group).collect(),
            documents: mix.documents(options.documents, options.arrivals, options.seed),
            seconds: (0..mix.parts.len()).map(seconds).collect(),
            waiting: vec![VecDeque::new(); mix.parts.len()],
            ends: BinaryHeap::new(),
            done: Vec::with_capacity(options.documents),
            refused: 0,
            now_s: 0.0,
            idle_beside_work: 0,
            drained: None,
        };
        simulation.go();
        simulation.outcome()
    }

    fn go(&mut self) {
        let mut next = 0;
        loop {
            let comes_s = self.documents.get(next).map(|(_, at_s)| *at_s);
            let ends_s = self.ends.peek().map(|end| end.at_s);
            match (comes_s, ends_s) {
                (Some(comes_s), ends_s) if ends_s.is_none_or(|ends_s| comes_s <= ends_s) => {
                    self.now_s = comes_s;
                    // All that come at the same moment, before any is sent.
                    while self.documents.get(next).is_some_and(|(_, at_s)| *at_s == comes_s) {
                        self.waiting[self.documents[next].0].push_back(next);
                        next += 1;
                    }
                    self.send();
                }
                (_, Some(_)) => self.end_step(),
                (_, None) => break,
            }
            if self.drained.is_none() && next == self.documents.len() && self.waiting.iter().all(VecDeque::is_empty) {
                self.drained = Some((self.now_s, self.busy_device_s(), self.done.len()));
            }
        }
    }

    fn end_step(&mut self) {
        let Some(StepEnd { at_s, group }) = self.ends.pop() else { return };
        self.now_s = at_s;
        for document in self.groups[group].end() {
            let (part, came_s) = self.documents[document];
            self.done.push(Done { document, part, came_s, done_s: at_s });
        }
        self.send();
        self.continue_group(group);
        self.look_for_idle_groups();
    }

    fn look_for_idle_groups(&mut self) {
        let waits = |part: &usize| !self.waiting[*part].is_empty();
        let fits = |group: usize| (0..self.waiting.len()).filter(waits).any(|part| self.seconds[part][group].is_some());
        self.idle_beside_work +=
            (0..self.groups.len()).filter(|group| self.groups[*group].is_idle() && fits(*group)).count();
    }

    /// Sends to groups what can go, the earliest first.
    fn send(&mut self) {
        let mut loads: Vec<_> = self.groups.iter().map(Group::load).collect();
        let mut stuck = vec![false; self.waiting.len()];
        // Of a length the first speaks for all: what it can not do, they can not.
        while let Some(part) = self.first_of(&stuck) {
            match place(&self.seconds[part], &loads) {
                Destination::Group(group) => {
                    let Some(document) = self.waiting[part].pop_front() else { return };
                    let Some(profile) = self.profiles.get(self.groups[group].ranks, part) else { return };
                    self.groups[group].add(document, *profile, self.options.new_tokens);
                    loads[group] = self.groups[group].load();
                    if self.groups[group].is_idle() {
                        self.continue_group(group);
                    }
                }
                Destination::Later => stuck[part] = true,
                Destination::Nowhere => {
                    self.refused += self.waiting[part].len();
                    self.waiting[part].clear();
                }
            }
        }
    }

    /// The length of the earliest document that waits and is not stuck.
    fn first_of(&self, stuck: &[bool]) -> Option<usize> {
        let first = |part: &usize| self.waiting[*part].front().copied();
        (0..self.waiting.len()).filter(|part| !stuck[*part] && first(part).is_some()).min_by_key(first)
    }

    fn continue_group(&mut self, group: usize) {
        if self.groups[group].is_idle()
            && let Some(seconds) = self.groups[group].begin(self.profiles)
        {
            self.ends.push(StepEnd { at_s: self.now_s + seconds, group });
        }
    }

    fn busy_device_s(&self) -> f64 {
        self.groups.iter().map(|group| group.busy_s * group.ranks as f64).sum()
    }

    fn outcome(self) -> Outcome {
        let devices: usize = self.groups.iter().map(|group| group.ranks).sum();
        let (span_s, busy_s, done) = self.drained.unwrap_or((self.now_s, self.busy_device_s(), self.done.len()));
        let over_budget = |group: &&Group| group.peak_bytes > self.profiles.budget_bytes(group.ranks);
        Outcome {
            per_hour: if span_s > 0.0 { 3600.0 * done as f64 / span_s } else { 0.0 },
            busy_share: if span_s > 0.0 { busy_s / (span_s * devices as f64) } else { 0.0 },
            refused: self.refused + self.groups.iter().map(|group| group.refused).sum::<usize>(),
            idle_beside_work: self.idle_beside_work,
            groups_over_budget: self.groups.iter().filter(over_budget).count(),
            done: self.done,
        }
    }
}
