//! What installations learn about the time that inferences take.
//!
//! Invariant: every process of an installation adds to the same rates, and none loses what another added.

use async_trait::async_trait;

use super::StoreError;
use crate::cost::{Learned, Observation, Place, Rate, Work};

/// Learned rates.
#[async_trait]
pub trait CostStore: Send + Sync {
    /// Adds what an inference took, as [`Learned::observe`] does; nothing if it makes no sense.
    async fn cost_observe(&self, observation: &Observation) -> Result<(), StoreError>;

    /// What is known about a model, for each kind and number of devices it ran on, in the order of their names.
    async fn cost_learned(&self, model_digest: &str) -> Result<Vec<(Place, Learned)>, StoreError>;
}

/// Joins the two kinds of work of each place; rows come sorted by place.
pub(super) fn joined(rows: Vec<(Place, (Work, Rate))>) -> Vec<(Place, Learned)> {
    let mut places: Vec<(Place, Learned)> = Vec::new();
    for (place, (work, rate)) in rows {
        if places.last().is_none_or(|(last, _)| *last != place) {
            places.push((place, Learned::default()));
        }
        if let Some((_, learned)) = places.last_mut() {
            learned.set(work, rate);
        }
    }
    places
}
