//! Whether the parts of the process do their work: what `/readyz` says.
//!
//! Invariant: a part that was never reported ready is not ready.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// All parts; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<Arc<str>, Option<String>>>>);

/// One part's side of it.
#[derive(Debug, Clone)]
pub struct Component {
    name: Arc<str>,
    health: Health,
}

impl Health {
    /// A part, not ready yet.
    pub fn component(&self, name: impl Into<Arc<str>>) -> Component {
        let component = Component { name: name.into(), health: self.clone() };
        component.degraded("starting");
        component
    }

    /// Why the process is not ready, a line for each part that is not; empty if it is.
    pub fn faults(&self) -> Vec<String> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.iter().filter_map(|(name, fault)| fault.as_ref().map(|fault| format!("{name}: {fault}"))).collect()
    }

    /// Every part, and whether it does its work.
    pub fn parts(&self) -> Vec<(Arc<str>, bool)> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.iter().map(|(name, fault)| (Arc::clone(name), fault.is_none())).collect()
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
        self.health.0.lock().unwrap_or_else(PoisonError::into_inner).insert(Arc::clone(&self.name), fault);
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
}
