//! Requests that have ended an engine, remembered by what they are: the same again runs alone, so that its next try costs nobody else.
//!
//! Invariant: bounded; of a request only a hash is kept.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::engine::InferRequest;

/// How many are remembered; a job that ends engines comes back within minutes.
const REMEMBERED: usize = 256;

/// What tells a request from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    /// Of everything that decides what the engine does.
    pub fn of(request: &InferRequest) -> Self {
        let mut hasher = DefaultHasher::new();
        (&request.context, &request.query, request.query_at).hash(&mut hasher);
        // A request that cannot be written as JSON never reaches an engine.
        if let Ok(options) = serde_json::to_vec(&(&request.attention, &request.generation)) {
            options.hash(&mut hasher);
        }
        Self(hasher.finish())
    }
}

/// The latest ones.
#[derive(Debug, Default)]
pub(super) struct Culprits(VecDeque<Fingerprint>);

impl Culprits {
    /// This one has ended an engine.
    pub fn add(&mut self, fingerprint: Fingerprint) {
        self.forget(fingerprint);
        self.0.push_back(fingerprint);
        if self.0.len() > REMEMBERED {
            self.0.pop_front();
        }
    }

    /// It has come to its end without harm.
    pub fn forget(&mut self, fingerprint: Fingerprint) {
        self.0.retain(|known| *known != fingerprint);
    }

    /// Whether it did it before.
    pub fn knows(&self, fingerprint: Fingerprint) -> bool {
        self.0.contains(&fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_known_until_they_do_no_harm() {
        let mut culprits = Culprits::default();
        (0..=REMEMBERED as u64).for_each(|n| culprits.add(Fingerprint(n)));
        assert!(!culprits.knows(Fingerprint(0)) && culprits.knows(Fingerprint(1)));
        culprits.forget(Fingerprint(1));
        assert!(!culprits.knows(Fingerprint(1)));
    }
}
