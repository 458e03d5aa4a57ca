//! One rank: what it computes with, the buffers of its rows, and the two halves of a layer around attention.
//!
//! Invariant: a row's result depends on that row, and on the number of ranks, alone here; rows meet only in attention.

use std::ops::Range;

use crate::backend::{Backend, BackendError, HeadShape, PART_COLS};
use crate::comm::{Combining, Comm, CommError, Partials};
use crate::model::ModelSpec;
use crate::model::weights::{LayerWeights, Weights};

/// What a rank computes with. `comm` is its end of the communicator between all ranks of the prefill.
pub struct Rank<'a, B: Backend, C> {
    /// The rank's device.
    pub backend: &'a B,
    /// Its end of the communicator.
    pub comm: C,
    /// The whole model, on that device.
    pub weights: &'a Weights<B>,
    /// Its shapes.
    pub spec: &'a ModelSpec,
}

impl<B: Backend, C: Comm<B::Matrix, B::Scores>> Rank<'_, B, C> {
    /// Heads of an attention layer.
    pub(super) fn shape(&self) -> HeadShape {
        self.spec.shape
    }

    /// How `rows` rows of partial results of `width` elements become one without being gathered, if they can, and from which row on this rank has to leave its
    /// own: from the first then, else at its place among those of all ranks.
    pub(super) fn combining(&self, rows: usize, width: usize) -> (Option<Combines<'_, B>>, usize) {
        match self.comm.combining(rows, width) {
            Some(combining) => (Some(combining), 0),
            None => (None, self.comm.rank() * rows),
        }
    }

    /// Has the partial results of all ranks, `rows` rows of each, at their places.
    pub(super) fn gather_partials(
        &self,
        rows: usize,
        partials: Partials<'_, B::Matrix, B::Scores>,
    ) -> Result<(), CommError> {
        self.comm.all_gather_partials(partials, &vec![rows; self.comm.size()])
    }
}

/// What makes partial results of a backend's ranks one.
type Combines<'a, B> = &'a dyn Combining<<B as Backend>::Matrix, <B as Backend>::Scores>;

/// The rank that chooses the tokens and talks to the caller.
pub(super) const ROOT: usize = 0;

/// Why a rank stopped.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// An operation failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A collective failed, perhaps because another rank gave up.
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// The activations of a run of rows, reused by every layer.
pub(super) struct Activations<B: Backend> {
    /// The residual stream, `[rows, hidden]`.
    pub x: B::Matrix,
    /// Its norm, `[rows, hidden]`.
    h: B::Matrix,
    /// Packed queries, keys and values.
    pub qkv: B::Matrix,
    /// What attention gave, `[rows, heads * head_dim]`.
    pub attended: B::Matrix,
}

impl<B: Backend> Activations<B> {
    /// Room for `rows` rows.
    pub fn new(backend: &B, spec: &ModelSpec, rows: usize) -> Result<Self, BackendError> {
        let rows = rows.max(1);
        Ok(Self {
            x: backend.matrix(rows, spec.hidden)?,
            h: backend.matrix(rows, spec.hidden)?,
            qkv: backend.matrix(rows, spec.shape.qkv_width())?,
            attended: backend.matrix(rows, spec.shape.q_width())?,
        })
    }

    /// Before attention: `qkv = W_qkv norm(x) + b` for the first `rows` rows, RoPE not yet applied.
    pub fn project(
        &mut self,
        backend: &B,
        spec: &ModelSpec,
        layer: &LayerWeights<B>,
        rows: usize,
    ) -> Result<(), BackendError> {
        backend.rms_norm(rows, &self.x, &layer.attention_norm, spec.epsilon, &mut self.h)?;
        backend.linear(rows, &self.h, &layer.qkv, layer.qkv_bias.as_ref(), false, &mut self.qkv)
    }

    /// After attention: `x += W_o attended + b`, then `x += mlp(norm(x))`, for the first `rows` rows.
    pub fn close(
        &mut self,
        backend: &B,
        spec: &ModelSpec,
        layer: &LayerWeights<B>,
        rows: usize,
    ) -> Result<(), BackendError> {
        self.take_attended(backend, spec, layer, rows)?;
        backend.mlp(rows, &self.h, &layer.gate_up, &layer.down, &mut self.x)
    }

    /// The same where all ranks have the same rows: each takes a part of the MLP's width, so that it reads a part of the weights. `sums` has `rows` rows for
    /// each rank, `[_, hidden]`.
    pub fn close_together<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        layer: &LayerWeights<B>,
        rows: usize,
        sums: &mut B::Scores,
    ) -> Result<(), RankError> {
        let (backend, own, ranks) = (rank.backend, rank.comm.rank(), rank.comm.size());
        self.take_attended(backend, rank.spec, layer, rows)?;
        let part = part_of_width(rank.spec.intermediate, own, ranks);
        let (combining, first_row) = rank.combining(rows, rank.spec.hidden);
        backend.mlp_part(rows, &self.h, &layer.gate_up, &layer.down, part, sums, first_row)?;
        if let Some(combining) = combining {
            return Ok(combining.add_sums(rows, sums, &mut self.x)?);
        }
        rank.gather_partials(rows, Partials::Sums(sums))?;
        Ok(backend.add_partials(rows, ranks, sums, &mut self.x)?)
    }

    /// `x += W_o attended + b`, and its norm for the MLP.
    fn take_attended(
        &mut self,
        backend: &B,
        spec: &ModelSpec,
        layer: &LayerWeights<B>,
        rows: usize,
    ) -> Result<(), BackendError> {
        backend.linear(rows, &self.attended, &layer.o, layer.o_bias.as_ref(), true, &mut self.x)?;
        backend.rms_norm(rows, &self.x, &layer.mlp_norm, spec.epsilon, &mut self.h)
    }
}

/// Columns of the MLP's width that are a rank's: as even as can be in whole pieces.
fn part_of_width(width: usize, rank: usize, ranks: usize) -> Range<usize> {
    let pieces = width.div_ceil(PART_COLS);
    let first_of = |rank: usize| (pieces * rank / ranks * PART_COLS).min(width);
    first_of(rank)..first_of(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_width_are_all_of_it_in_order() {
        for (width, ranks) in [(14336, 8), (96, 5), (20, 3), (8, 4), (1, 2)] {
            let parts: Vec<_> = (0..ranks).map(|rank| part_of_width(width, rank, ranks)).collect();
            assert_eq!(parts.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..width).collect::<Vec<_>>());
            let lengths = parts.iter().map(ExactSizeIterator::len);
            assert!(lengths.clone().max() <= lengths.min().map(|least| least + PART_COLS), "{parts:?}");
            assert!(parts.iter().all(|part| part.start.is_multiple_of(PART_COLS) || part.start == width), "{parts:?}");
        }
    }
}
