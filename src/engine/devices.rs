//! Where an engine's ranks run.
//!
//! Invariant: a communicator serves one group; after a failure nothing of it is used again.

use std::sync::Arc;

use crate::backend::{Backend, HeadShape};
use crate::comm::Comm;
use crate::comm::hub::Side;
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

/// The ranks of this process, joined to all others.
pub struct Connected<D: Devices + ?Sized> {
    /// Backends and communicator ends, by rank; every node has as many.
    pub members: Vec<(Arc<D::Backend>, D::Comm)>,
    /// What a group on several nodes has here beside its ranks.
    pub side: Option<Side>,
}

/// Devices with a model's weights on them.
pub trait Devices: Send + Sync + 'static {
    /// What a rank computes with.
    type Backend: Backend;
    /// What connects the ranks.
    type Comm: Comm<MatrixOf<Self>, ScoresOf<Self>>;

    /// For people: `cpu`, `2 x cuda`.
    fn name(&self) -> String;
    /// Ranks there are, on all nodes.
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
    /// Whether they can be joined once only: other nodes come to one process, with the token that it was started with.
    fn are_joined_once(&self) -> bool;
    /// Joins the ranks.
    fn connect(&self) -> Result<Connected<Self>, EngineError>;
    /// The weights as the `index`-th rank of this process uses them.
    fn weights(&self, index: usize) -> &Weights<Self::Backend>;
}
