//! Whether the parts of the process do their work: what `/readyz` says.
//!
//! Invariant: a part that was never reported ready is not ready.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// All parts; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<Arc<str>, Part>>>);

#[derive(Debug)]
struct Part {
    fault: Option<String>,
    /// The whole that is ready as long as one of its parts is.
    of: Option<Arc<str>>,
}

/// One part's side of it.
#[derive(Debug, Clone)]
pub struct Component {
    name: Arc<str>,
    of: Option<Arc<str>>,
    health: Health,
}

impl Health {
    /// A part, not ready yet.
    pub fn component(&self, name: impl Into<Arc<str>>) -> Component {
        self.start(name.into(), None)
    }

    /// A part of several that do the same: `of` is ready as long as one of them is. Not ready yet.
    pub fn one_of(&self, of: &str, name: impl Into<Arc<str>>) -> Component {
        self.start(name.into(), Some(of.into()))
    }

    fn start(&self, name: Arc<str>, of: Option<Arc<str>>) -> Component {
        let component = Component { name, of, health: self.clone() };
        component.degraded("starting");
        component
    }

    /// Why the process is not ready, a line for each part that is not; empty if it is.
    pub fn faults(&self) -> Vec<String> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stands_in = |of: &Arc<str>| parts.values().any(|part| part.fault.is_none() && part.of.as_ref() == Some(of));
        let missed = parts.iter().filter(|(_, part)| !part.of.as_ref().is_some_and(stands_in));
        missed.filter_map(|(name, part)| part.fault.as_ref().map(|fault| format!("{name}: {fault}"))).collect()
    }

    /// Every part, and whether it does its work; of several that do the same also the whole.
    pub fn parts(&self) -> Vec<(Arc<str>, bool)> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: BTreeMap<Arc<str>, bool> = BTreeMap::new();
        for (name, part) in parts.iter() {
            all.insert(Arc::clone(name), part.fault.is_none());
            if let Some(of) = &part.of {
                *all.entry(Arc::clone(of)).or_default() |= part.fault.is_none();
            }
        }
        all.into_iter().collect()
    }
}

impl Component {
    /// It does its work.
    pub fn ready(&self) {
        self.set(None);
    }

    /// It does not, and why; no secrets.
    pub fn degraded(&self, reason: &str) {
        self.set(Some(reason.to_owned()));
    }

    fn set(&self, fault: Option<String>) {
        let part = Part { fault, of: self.of.clone() };
        self.health.0.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::clone(&self.name), part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_to_be_ready() {
        let health = Health::default();
        let (intake, engine) = (health.component("intake"), health.component("engine"));
        intake.ready();
        assert_eq!(health.faults(), ["engine: starting"]);
        engine.ready();
        assert!(health.faults().is_empty());
        intake.degraded("gone");
        assert_eq!(health.faults(), ["intake: gone"]);
    }

    #[test]
    fn of_parts_that_do_the_same_one_is_enough() {
        let health = Health::default();
        let (one, other) = (health.one_of("engine", "engine 1"), health.one_of("engine", "engine 2"));
        assert_eq!(health.faults(), ["engine 1: starting", "engine 2: starting"]);
        one.ready();
        assert!(health.faults().is_empty());
        let parts = health.parts();
        let parts: Vec<(&str, bool)> = parts.iter().map(|(name, is_ready)| (&**name, *is_ready)).collect();
        assert_eq!(parts, [("engine", true), ("engine 1", true), ("engine 2", false)]);
        one.degraded("gone");
        other.degraded("gone");
        assert_eq!(health.faults().len(), 2);
    }
}
