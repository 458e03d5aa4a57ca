//! Where an engine's ranks run.
//!
//! Invariant: a communicator serves one group; after a failure nothing of it is used again.

use std::sync::Arc;

use crate::backend::{Backend, HeadShape};
use crate::comm::Comm;
use crate::model::ModelSpec;
use crate::model::weights::Weights;

use super::EngineError;

/// Memory that an inference may use beyond the weights, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// All ranks together.
    Shared(u64),
    /// Each rank, on its own device.
    Each(u64),
}

/// Communicator end of the ranks of `D`.
pub type CommOf<D> = <D as Devices>::Comm;
/// Matrix of the ranks of `D`.
pub type MatrixOf<D> = <<D as Devices>::Backend as Backend>::Matrix;
/// Scores of the ranks of `D`.
pub type ScoresOf<D> = <<D as Devices>::Backend as Backend>::Scores;

/// Devices with a model's weights on them.
pub trait Devices: Send + Sync + 'static {
    /// What a rank computes with.
    type Backend: Backend;
    /// What connects the ranks.
    type Comm: Comm<MatrixOf<Self>, ScoresOf<Self>>;

    /// For people: `cpu`, `2 x cuda`.
    fn name(&self) -> String;
    /// Ranks there are.
    fn ranks(&self) -> usize;
    /// Sequences that they work on at a time, at most.
    fn concurrency(&self) -> usize;
    /// Bytes of an activation.
    fn element_bytes(&self) -> usize;
    /// Bytes of a row of keys and its values in one layer, as they are kept for decode.
    fn kept_row_bytes(&self, shape: HeadShape) -> usize {
        2 * shape.kv_width() * self.element_bytes()
    }
    /// What a rank's backend uses at most for itself while it computes, in bytes.
    fn scratch_bytes(&self, spec: &ModelSpec) -> u64;
    /// What there is now.
    fn memory(&self) -> Memory;
    /// Backends and connected communicator ends of the first `active` ranks, in their order.
    #[allow(clippy::type_complexity)]
    fn connect(&self, active: usize) -> Result<Vec<(Arc<Self::Backend>, Self::Comm)>, EngineError>;
    /// The weights as rank `rank` uses them.
    fn weights(&self, rank: usize) -> &Weights<Self::Backend>;
}
