//! The pool: documents come into the queue, are claimed, wait for a group, and are done.
//!
//! Invariant: time never goes back; the pool claims as many documents as it can have in hand, in the order in which the store gives them out.

use std::cmp::Ordering;
use std::collections::{BTreeSet, BinaryHeap};

use super::group::{Ending, Group};
use super::layout::Layout;
use super::mix::{Arrivals, Mix};
use super::outcome::{Done, Outcome};
use super::profile::Profiles;
use crate::engine::schedule::Limits;
use crate::plan::route::{GroupShape, Router, Ticket};

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
    router: Router,
    /// Documents that the pool has in hand at most: as many as its groups work on, and one more for each of several.
    capacity: usize,
    /// Part of the mix and time of coming, of each document.
    documents: Vec<(usize, f64)>,
    /// Documents that nobody has claimed, by length and time of coming: the store gives out the shortest first.
    queue: BTreeSet<(usize, usize)>,
    /// Documents that were claimed and wait for a group.
    waiting: BTreeSet<usize>,
    in_hand: usize,
    ends: BinaryHeap<StepEnd>,
    done: Vec<Done>,
    refused: usize,
    now_s: f64,
    /// Moments at which a group had nothing to do beside a document that fits it.
    idle_beside_work: usize,
}

impl<'a> Simulation<'a> {
    /// Runs a pool until all documents are done.
    pub fn run(layout: &Layout, mix: &Mix, profiles: &'a Profiles<'a>, options: SimulationOptions) -> Outcome {
        let slots = options.limits.at_once;
        let group = |ranks: &usize| Group::new(*ranks, options.limits, profiles.budget_bytes(*ranks));
        let shape = |ranks: &usize| GroupShape { ranks: *ranks, slots, memory_bytes: profiles.budget_bytes(*ranks) };
        let mut router = Router::new(layout.groups.iter().map(shape));
        (0..layout.groups.len()).for_each(|group| router.set_open(group, true));
        let ahead = if layout.groups.len() > 1 { layout.groups.len() } else { 0 };
        let mut simulation = Self {
            profiles,
            options,
            groups: layout.groups.iter().map(group).collect(),
            router,
            capacity: slots * layout.groups.len() + ahead,
            documents: mix.documents(options.documents, options.arrivals, options.seed),
            queue: BTreeSet::new(),
            waiting: BTreeSet::new(),
            in_hand: 0,
            ends: BinaryHeap::new(),
            done: Vec::with_capacity(options.documents),
            refused: 0,
            now_s: 0.0,
            idle_beside_work: 0,
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
                    // All that come at the same moment, before any is claimed.
                    while self.documents.get(next).is_some_and(|(_, at_s)| *at_s == comes_s) {
                        self.queue.insert((self.documents[next].0, next));
                        next += 1;
                    }
                    self.send();
                }
                (_, Some(_)) => self.end_step(),
                (_, None) => break,
            }
        }
    }

    fn end_step(&mut self) {
        let Some(StepEnd { at_s, group }) = self.ends.pop() else { return };
        self.now_s = at_s;
        let Ending { done, prefilled } = self.groups[group].end();
        if let Some((document, part)) = prefilled {
            self.router.prefilled(document as Ticket, part);
        }
        for document in &done {
            let (part, came_s) = self.documents[*document];
            self.router.leave(*document as Ticket);
            self.in_hand -= 1;
            self.done.push(Done { document: *document, part, came_s, done_s: at_s });
        }
        // Nothing else gives room to one that waits.
        if !done.is_empty() || prefilled.is_some_and(|(_, part)| part >= 1.0) {
            self.send();
        }
        self.continue_group(group);
        self.look_for_idle_groups();
    }

    /// Claims what the pool can have in hand, and sends to groups what can go.
    fn send(&mut self) {
        while self.in_hand < self.capacity
            && let Some((part, document)) = self.queue.pop_first()
        {
            self.claim(part, document);
        }
        while let Some((ticket, group)) = self.router.place_next() {
            let document = ticket as usize;
            self.waiting.remove(&document);
            if let Some(profile) = self.profiles.get(self.groups[group].ranks, self.documents[document].0) {
                self.groups[group].add(document, *profile, self.options.new_tokens);
                self.continue_group(group);
            }
        }
    }

    fn claim(&mut self, part: usize, document: usize) {
        let ticket = document as Ticket;
        self.router.arrive(ticket);
        let mut fits = false;
        for group in 0..self.groups.len() {
            if let Some(profile) = self.profiles.get(self.groups[group].ranks, part) {
                fits = true;
                self.router.offer(ticket, group, profile.offer());
            }
        }
        match fits {
            true => {
                self.waiting.insert(document);
                self.in_hand += 1;
            }
            false => {
                self.router.leave(ticket);
                self.refused += 1;
            }
        }
    }

    fn look_for_idle_groups(&mut self) {
        for group in self.groups.iter().filter(|group| group.is_idle()) {
            let fits = |document: &usize| self.profiles.get(group.ranks, self.documents[*document].0).is_some();
            self.idle_beside_work += usize::from(self.waiting.iter().any(fits));
        }
    }

    /// Begins the next step of a group that has none.
    fn continue_group(&mut self, group: usize) {
        if !self.groups[group].is_idle() {
            return;
        }
        if let Some(beginning) = self.groups[group].begin(self.profiles) {
            self.ends.push(StepEnd { at_s: self.now_s + beginning.seconds, group });
            for document in &beginning.began {
                self.router.prefilled(*document as Ticket, 0.0);
            }
            if !beginning.began.is_empty() {
                self.send();
            }
        }
    }

    fn outcome(self) -> Outcome {
        let devices: usize = self.groups.iter().map(|group| group.ranks).sum();
        let busy_s: f64 = self.groups.iter().map(|group| group.busy_s * group.ranks as f64).sum();
        let over_budget = |group: &&Group| group.peak_bytes > self.profiles.budget_bytes(group.ranks);
        let of_span = |amount: f64| if self.now_s > 0.0 { amount / self.now_s } else { 0.0 };
        Outcome {
            per_hour: of_span(3600.0 * self.done.len() as f64),
            busy_share: of_span(busy_s / devices as f64),
            refused: self.refused + self.groups.iter().map(|group| group.refused.len()).sum::<usize>(),
            idle_beside_work: self.idle_beside_work,
            groups_over_budget: self.groups.iter().filter(over_budget).count(),
            done: self.done,
        }
    }
}
