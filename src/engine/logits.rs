//! The language-model head: every rank computes the logits of a part of the vocabulary, and all of them come to every rank.
//!
//! Invariant: every rank has the same logits, bit for bit.

use crate::backend::{Backend, BackendError, Next, Wanted, even_part};
use crate::comm::{Comm, Partials};

use super::rank::{Rank, RankError};

/// Logits of the last tokens of sequences, and the room they take.
pub(super) struct Logits<B: Backend> {
    /// `[rows, vocab]`.
    all: B::Scores,
    /// What every rank's part of the vocabulary gives, rows of a rank below those of another; of several ranks.
    parts: Option<B::Scores>,
}

impl<B: Backend> Logits<B> {
    /// Room for `rows` rows.
    pub fn new<C: Comm<B::Matrix, B::Scores>>(rank: &Rank<'_, B, C>, rows: usize) -> Result<Self, BackendError> {
        let (backend, vocab, ranks) = (rank.backend, rank.spec.vocab, rank.comm.size());
        let width = even_part(vocab, 0, ranks).len();
        let parts = if ranks > 1 { Some(backend.scores(rows * ranks, width)?) } else { None };
        Ok(Self { all: backend.scores(rows, vocab)?, parts })
    }

    /// Logits of the first `rows` rows of `x`, which are the same on every rank.
    pub fn give<C: Comm<B::Matrix, B::Scores>>(
        &mut self,
        rank: &Rank<'_, B, C>,
        rows: usize,
        x: &B::Matrix,
    ) -> Result<(), RankError> {
        let (backend, vocab, own, ranks) = (rank.backend, rank.spec.vocab, rank.comm.rank(), rank.comm.size());
        let head = rank.weights.language_model_head(rank.spec);
        let Self { all, parts } = self;
        let Some(parts) = parts else { return Ok(backend.logits(rows, x, &head, 0..vocab, all, 0)?) };
        let part = even_part(vocab, own, ranks);
        let (combining, first_row) = rank.combining(rows, part.len());
        backend.logits(rows, x, &head, part, parts, first_row)?;
        if let Some(combining) = combining {
            return Ok(combining.join_columns(rows, parts, all)?);
        }
        rank.gather_partials(rows, Partials::Columns(parts))?;
        Ok(backend.join_columns(rows, ranks, parts, all)?)
    }

    /// For each of the first rows what is wanted of it.
    pub fn next(&self, backend: &B, wanted: &[Wanted]) -> Result<Vec<Next>, RankError> {
        Ok(backend.next_tokens(&self.all, wanted)?)
    }
}
