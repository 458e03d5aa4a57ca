//! Who may be in a child, and who is to blame when it ends under them.
//!
//! A request that was alone in a child that ended has caught itself. Of several any one may have done it: they are suspects, and each of them
//! runs alone until one is caught; the others are released then. One that was caught before is known, and always runs alone.
//!
//! Invariant: pure. Nobody is beside a request that is suspected or known; a request is caught only by what it did alone, or by what the
//! child said of it.

use std::collections::BTreeMap;
use std::time::Duration;

/// How a request may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Beside others.
    Free,
    /// Alone: it was in a child that ended.
    Suspect,
    /// Alone: one like it has ended a child before.
    Known,
}

/// What the end of a child means for a request that was in it or waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is to blame.
    Caught,
    /// It may be to blame, and is to run again, alone.
    Suspected,
    /// It is not to blame, and may go where it wants.
    Released,
}

#[derive(Debug)]
struct Flight {
    standing: Standing,
    running: bool,
    budget: Duration,
    fate: Option<Fate>,
}

/// All requests of one supervisor, by their ids: those that wait and those in the child.
#[derive(Debug, Default)]
pub(super) struct Flights(BTreeMap<u64, Flight>);

impl Flights {
    /// A request comes; `budget` is the silence that is borne for it, `known` that one like it was caught before.
    pub fn enter(&mut self, id: u64, known: bool, budget: Duration) {
        let standing = if known { Standing::Known } else { Standing::Free };
        self.0.insert(id, Flight { standing, running: false, budget, fate: None });
    }

    /// It has ended, or is not wanted any more.
    pub fn leave(&mut self, id: u64) {
        self.0.remove(&id);
    }

    /// Whether it may go into a child that takes `capacity` at a time.
    pub fn may_start(&self, id: u64, capacity: usize) -> bool {
        match self.next_alone() {
            // The latest of them first: the others had gone on before it came.
            Some(next) => next == id && self.running() == 0,
            None => self.running() < capacity,
        }
    }

    /// It goes into the child, or (`false`) did not get there.
    pub fn set_running(&mut self, id: u64, running: bool) {
        if let Some(flight) = self.0.get_mut(&id) {
            flight.running = running;
        }
    }

    /// Requests in the child.
    pub fn running(&self) -> usize {
        self.0.values().filter(|flight| flight.running).count()
    }

    /// How many more could go into a child that takes `capacity` at a time, beside those that wait already.
    pub fn room(&self, capacity: usize) -> usize {
        if self.next_alone().is_some() { 0 } else { capacity.saturating_sub(self.0.len()) }
    }

    /// Silence that is borne while these requests run: what the most patient of them bears.
    pub fn silence(&self) -> Duration {
        self.budgets().max().unwrap_or_default()
    }

    /// How long one of them may stand still while others go on: until each of the others could have had its turn.
    pub fn patience(&self) -> Duration {
        self.budgets().fold(Duration::ZERO, Duration::saturating_add)
    }

    /// The child has ended, by the doing of `culprit` if that is known.
    pub fn child_ended(&mut self, culprit: Option<u64>) {
        let alone = if self.running() == 1 { self.0.iter().find(|(_, flight)| flight.running) } else { None };
        let culprit = culprit.or(alone.map(|(id, _)| *id));
        for (id, flight) in &mut self.0 {
            let was_running = std::mem::take(&mut flight.running);
            flight.fate = match culprit {
                Some(culprit) if culprit == *id => Some(Fate::Caught),
                Some(_) if was_running || flight.standing == Standing::Suspect => Some(Fate::Released),
                None if was_running => Some(Fate::Suspected),
                _ => continue,
            };
            if flight.fate == Some(Fate::Suspected) {
                flight.standing = Standing::Suspect;
            }
        }
    }

    /// What became of a request at the last end of a child, told once.
    pub fn fate(&mut self, id: u64) -> Option<Fate> {
        self.0.get_mut(&id)?.fate.take()
    }

    /// The request that has to run alone next, or does so now.
    fn next_alone(&self) -> Option<u64> {
        let alone = |flight: &Flight| flight.standing != Standing::Free && flight.fate != Some(Fate::Released);
        let running = self.0.iter().find(|(_, flight)| flight.running && alone(flight));
        let latest = self.0.iter().rev().find(|(_, flight)| alone(flight));
        running.or(latest).map(|(id, _)| *id)
    }

    fn budgets(&self) -> impl Iterator<Item = Duration> {
        self.0.values().filter(|flight| flight.running).map(|flight| flight.budget)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOOR: Duration = Duration::from_secs(30);

    fn flights(ids: std::ops::Range<u64>) -> Flights {
        let mut flights = Flights::default();
        ids.for_each(|id| flights.enter(id, false, FLOOR));
        flights
    }

    /// Lets in who may come in.
    fn start(flights: &mut Flights, capacity: usize) -> Vec<u64> {
        let ids: Vec<u64> = flights.0.iter().filter(|(_, flight)| !flight.running).map(|(id, _)| *id).collect();
        let start = |id: &u64| {
            let may = flights.may_start(*id, capacity);
            if may {
                flights.set_running(*id, true);
            }
            may
        };
        ids.into_iter().filter(start).collect()
    }

    #[test]
    fn who_was_alone_is_caught_at_once() {
        let mut flights = flights(0..2);
        assert_eq!(start(&mut flights, 1), [0]);
        flights.child_ended(None);
        assert_eq!((flights.fate(0), flights.fate(1)), (Some(Fate::Caught), None));
    }

    #[test]
    fn of_several_each_runs_alone_until_one_is_caught() {
        let mut flights = flights(0..4);
        assert_eq!(start(&mut flights, 3), [0, 1, 2]);
        flights.child_ended(None);
        assert!((0..3).all(|id| flights.fate(id) == Some(Fate::Suspected)));
        assert_eq!(start(&mut flights, 3), [2], "alone, before one that is not suspected");
        flights.leave(2);
        assert_eq!(start(&mut flights, 3), [1]);
        flights.child_ended(None);
        assert_eq!((flights.fate(1), flights.fate(0)), (Some(Fate::Caught), Some(Fate::Released)));
        flights.leave(1);
        flights.leave(0);
        assert_eq!(start(&mut flights, 3), [3]);
    }

    #[test]
    fn what_the_child_says_of_one_releases_the_others() {
        let mut flights = flights(0..3);
        start(&mut flights, 3);
        flights.child_ended(Some(1));
        let fates: Vec<_> = (0..3).map(|id| flights.fate(id)).collect();
        assert_eq!(fates, [Some(Fate::Released), Some(Fate::Caught), Some(Fate::Released)]);
    }

    #[test]
    fn what_was_caught_before_runs_alone_when_the_child_is_empty() {
        let mut flights = flights(0..2);
        start(&mut flights, 4);
        flights.enter(2, true, FLOOR);
        flights.enter(3, false, FLOOR);
        assert!(start(&mut flights, 4).is_empty(), "the child empties first");
        flights.leave(0);
        flights.leave(1);
        assert_eq!(start(&mut flights, 4), [2]);
    }

    proptest! {
        /// However many requests kill the child: each of them is caught, nobody else ever is, and all others come to their end.
        #[test]
        fn only_killers_are_caught(count in 1u64..12, killers in proptest::collection::btree_set(0u64..12, 0..4), capacity in 1usize..6) {
            let mut flights = flights(0..count);
            let (mut caught, mut rounds) = (std::collections::BTreeSet::new(), 0);
            while !flights.0.is_empty() {
                rounds += 1;
                prop_assert!(rounds < 1000, "it comes to an end");
                start(&mut flights, capacity);
                let running: Vec<u64> = flights.0.iter().filter(|(_, flight)| flight.running).map(|(id, _)| *id).collect();
                prop_assert!(!running.is_empty() && running.len() <= capacity);
                if running.iter().any(|id| killers.contains(id)) {
                    flights.child_ended(None);
                } else {
                    running.iter().for_each(|id| flights.leave(*id));
                }
                for id in 0..count {
                    match flights.fate(id) {
                        Some(Fate::Caught) => {
                            caught.insert(id);
                            flights.leave(id);
                        }
                        // It comes back later, as somebody new.
                        Some(Fate::Released) => flights.enter(id, false, FLOOR),
                        Some(Fate::Suspected) | None => {}
                    }
                }
            }
            let expected: std::collections::BTreeSet<u64> = killers.into_iter().filter(|id| *id < count).collect();
            prop_assert_eq!(caught, expected);
        }
    }
}
