//! Ranks as threads of one process, exchanging rows through memory.
//!
//! Every collective is one round: each rank posts its piece and goes on; who needs the others' pieces waits for them. Rounds are numbered by
//! each rank in the order of its calls, so that ranks may be rounds apart without mixing them up.
//!
//! Invariant: a wait ends when the pieces are there, by an abort, because a peer is gone for good, or by the deadline.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::cpu::{Matrix, Scores};

use super::{Comm, CommError};

/// What a rank brings to a round.
struct Piece {
    /// Which collective this is and with which sizes: the same on every rank.
    call: Call,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    AllGather { counts: Vec<usize>, cols: usize },
    AllGatherScores { counts: Vec<usize>, cols: usize },
    Rotate { cols: usize },
    Broadcast { root: usize },
    Barrier,
}

impl Call {
    fn name(&self) -> &'static str {
        match self {
            Self::AllGather { .. } => "all_gather",
            Self::AllGatherScores { .. } => "all_gather_scores",
            Self::Rotate { .. } => "rotate",
            Self::Broadcast { .. } => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

enum Content {
    Nothing,
    Rows(Vec<f32>),
    Value(u64),
}

/// The pieces of one round, and how many ranks are done with them.
struct Round {
    pieces: Vec<Option<Arc<Piece>>>,
    left: usize,
}

#[derive(Default)]
struct State {
    rounds: HashMap<u64, Round>,
    /// Ranks whose end has been dropped.
    gone: Vec<usize>,
    /// Who ended the communicator, and why.
    aborted: Option<(usize, String)>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    size: usize,
    deadline: Duration,
}

/// One rank's end.
pub struct LocalComm {
    shared: Arc<Shared>,
    rank: usize,
    next_round: Cell<u64>,
}

/// A collective that has been started.
pub struct Pending {
    round: u64,
    call: Call,
    matrix: Matrix,
    /// Of a rotation: rows expected from the previous rank.
    receive_rows: usize,
}

impl LocalComm {
    /// The ends of a communicator of `size` ranks, in order. No wait lasts longer than `deadline`.
    pub fn group(size: usize, deadline: Duration) -> Vec<Self> {
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), size, deadline };
        let shared = Arc::new(shared);
        (0..size).map(|rank| Self { shared: Arc::clone(&shared), rank, next_round: Cell::new(0) }).collect()
    }

    /// Puts this rank's piece into its next round.
    fn post(&self, call: Call, content: Content) -> Result<u64, CommError> {
        let round = self.next_round.replace(self.next_round.get() + 1);
        let mut state = self.shared.lock();
        state.check()?;
        let size = self.shared.size;
        let entry = state.rounds.entry(round).or_insert_with(|| Round { pieces: vec![None; size], left: size });
        let mismatch = entry.pieces.iter().flatten().find(|piece| piece.call != call).map(|piece| piece.call.clone());
        entry.pieces[self.rank] = Some(Arc::new(Piece { call: call.clone(), content }));
        self.shared.changed.notify_all();
        match mismatch {
            None => Ok(round),
            Some(other) => {
                let error = self.mismatch(&call, format!("{other:?}"));
                state.abort(self.rank, error.to_string());
                Err(error)
            }
        }
    }

    fn mismatch(&self, call: &Call, got: String) -> CommError {
        CommError::Mismatch { op: call.name(), rank: self.rank, expected: format!("{call:?}"), got }
    }

    /// Waits for the pieces of `from` (all ranks if `None`) in a round, and leaves it.
    fn collect(&self, round: u64, op: &'static str, from: Option<usize>) -> Result<Vec<Arc<Piece>>, CommError> {
        let wanted = from.map_or(0..self.shared.size, |rank| rank..rank + 1);
        let end = Instant::now() + self.shared.deadline;
        let mut state = self.shared.lock();
        loop {
            state.check()?;
            let pieces = state.rounds.get(&round).map_or(&[][..], |round| &round.pieces[wanted.clone()]);
            let missing = pieces.iter().position(Option::is_none).map(|i| wanted.start + i);
            let Some(missing) = missing else {
                let pieces = pieces.iter().flatten().cloned().collect();
                state.leave(round);
                return Ok(pieces);
            };
            if state.gone.contains(&missing) {
                let reason = format!("rank {missing} ended before {op}");
                state.abort(missing, reason);
                self.shared.changed.notify_all();
                continue;
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                let error = CommError::TimedOut { op, rank: self.rank, seconds: self.shared.deadline.as_secs() };
                state.abort(self.rank, error.to_string());
                self.shared.changed.notify_all();
                return Err(error);
            };
            state = self.shared.changed.wait_timeout(state, left).map_or_else(|e| e.into_inner().0, |(state, _)| state);
        }
    }

    /// Copies everybody's rows to their places.
    fn gather(&self, round: u64, call: &Call, counts: &[usize], into: &mut Matrix) -> Result<(), CommError> {
        let pieces = self.collect(round, call.name(), None)?;
        let mut first = 0;
        for (rank, (piece, &count)) in pieces.iter().zip(counts).enumerate() {
            if let (true, Content::Rows(rows)) = (rank != self.rank, &piece.content) {
                into.rows_in_mut(first..first + count).copy_from_slice(rows);
            }
            first += count;
        }
        Ok(())
    }

    /// This rank's rows of an in-place all-gather.
    fn own_rows(&self, call: &Call, counts: &[usize], matrix: &Matrix) -> Result<Vec<f32>, CommError> {
        let total: usize = counts.iter().sum();
        if counts.len() != self.shared.size || total > matrix.rows() {
            let got = format!("{} counts, {total} rows in a matrix of {}", counts.len(), matrix.rows());
            let error = self.mismatch(call, got);
            self.abort(&error.to_string());
            return Err(error);
        }
        let first = counts[..self.rank].iter().sum();
        Ok(matrix.rows_in(first..first + counts[self.rank]).to_vec())
    }
}

impl Comm<Matrix, Scores> for LocalComm {
    type Pending = Pending;

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_gather(&self, rows: Matrix, counts: &[usize]) -> Result<Pending, CommError> {
        let call = Call::AllGather { counts: counts.to_vec(), cols: rows.cols() };
        let own = self.own_rows(&call, counts, &rows)?;
        let round = self.post(call.clone(), Content::Rows(own))?;
        Ok(Pending { round, call, matrix: rows, receive_rows: 0 })
    }

    fn rotate(&self, rows: Matrix, send_rows: usize, receive_rows: usize) -> Result<Pending, CommError> {
        let call = Call::Rotate { cols: rows.cols() };
        if send_rows.max(receive_rows) > rows.rows() {
            let got = format!("{send_rows} rows to send, {receive_rows} to receive, {} in the matrix", rows.rows());
            let error = self.mismatch(&call, got);
            self.abort(&error.to_string());
            return Err(error);
        }
        let round = self.post(call.clone(), Content::Rows(rows.rows_in(0..send_rows).to_vec()))?;
        Ok(Pending { round, call, matrix: rows, receive_rows })
    }

    fn finish(&self, pending: Pending) -> Result<Matrix, CommError> {
        let Pending { round, call, mut matrix, receive_rows } = pending;
        if let Call::AllGather { counts, .. } = &call {
            self.gather(round, &call, counts, &mut matrix)?;
            return Ok(matrix);
        }
        let previous = (self.rank + self.shared.size - 1) % self.shared.size;
        for piece in self.collect(round, call.name(), Some(previous))? {
            let Content::Rows(rows) = &piece.content else { continue };
            if rows.len() != receive_rows * matrix.cols() {
                let got = format!("{} rows from rank {previous}", rows.len() / matrix.cols().max(1));
                let error = self.mismatch(&call, format!("{got}, not {receive_rows}"));
                self.abort(&error.to_string());
                return Err(error);
            }
            matrix.rows_in_mut(0..receive_rows).copy_from_slice(rows);
        }
        Ok(matrix)
    }

    fn all_gather_scores(&self, rows: &mut Scores, counts: &[usize]) -> Result<(), CommError> {
        let call = Call::AllGatherScores { counts: counts.to_vec(), cols: rows.cols() };
        let own = self.own_rows(&call, counts, rows)?;
        let round = self.post(call.clone(), Content::Rows(own))?;
        self.gather(round, &call, counts, rows)
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        let call = Call::Broadcast { root };
        let content = if self.rank == root { Content::Value(value) } else { Content::Nothing };
        let round = self.post(call.clone(), content)?;
        let pieces = self.collect(round, call.name(), Some(root))?;
        match pieces.first().map(|piece| &piece.content) {
            Some(Content::Value(value)) => Ok(*value),
            _ => Err(self.mismatch(&call, "no value from the root".to_owned())),
        }
    }

    fn barrier(&self) -> Result<(), CommError> {
        let round = self.post(Call::Barrier, Content::Nothing)?;
        self.collect(round, Call::Barrier.name(), None).map(drop)
    }

    fn abort(&self, reason: &str) {
        self.shared.lock().abort(self.rank, reason.to_owned());
        self.shared.changed.notify_all();
    }
}

impl Drop for LocalComm {
    fn drop(&mut self) {
        self.shared.lock().gone.push(self.rank);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// A panic of another rank leaves nothing half done here: every change under the lock is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check(&self) -> Result<(), CommError> {
        match &self.aborted {
            None => Ok(()),
            Some((rank, reason)) => Err(CommError::Aborted { rank: *rank, reason: reason.clone() }),
        }
    }

    /// The first reason is kept.
    fn abort(&mut self, rank: usize, reason: String) {
        self.aborted.get_or_insert((rank, reason));
    }

    /// One rank needs this round no more; the last one takes it away.
    fn leave(&mut self, round: u64) {
        if let Some(entry) = self.rounds.get_mut(&round) {
            entry.left -= 1;
            if entry.left == 0 {
                self.rounds.remove(&round);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;

    #[test]
    fn collectives_move_the_right_rows() {
        conformance::collectives_move_the_right_rows(LocalComm::group);
    }

    #[test]
    fn an_abort_reaches_everybody() {
        conformance::an_abort_reaches_everybody(LocalComm::group);
    }

    #[test]
    fn a_rank_that_is_gone_ends_the_others() {
        conformance::a_rank_that_is_gone_ends_the_others(LocalComm::group);
    }

    #[test]
    fn the_first_to_finish_may_leave() {
        conformance::the_first_to_finish_may_leave(LocalComm::group);
    }

    #[test]
    fn a_wait_ends_at_the_deadline() {
        conformance::a_wait_ends_at_the_deadline(LocalComm::group);
    }

    #[test]
    fn disagreement_is_an_error_everywhere() {
        conformance::disagreement_is_an_error_everywhere(LocalComm::group);
    }

    #[test]
    fn finished_rounds_are_forgotten() {
        let group = LocalComm::group(1, Duration::from_secs(1));
        for _ in 0..10 {
            group[0].barrier().expect("one rank");
        }
        assert!(group[0].shared.lock().rounds.is_empty());
    }
}
