//! Ranks as threads of one process.
//!
//! Every collective is a round: each rank deposits what it brings, and takes what the others brought once they have all
//! come. Starting one is depositing, so it never waits; awaiting it is taking.
//!
//! Invariant: no data is copied while the rounds are locked; a rank that waits is woken by every deposit, abort and departure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::hub::{self, Place, Side};
use super::meeting::Meeting;
use super::rounds::{Call, Deposit, Rounds};
use super::{Comm, CommError};
use crate::backend::cpu::{Matrix, Scores};

/// One rank's end of a communicator between threads. Dropping it while others wait for it aborts them.
pub struct LocalComm {
    rank: usize,
    size: usize,
    /// Collectives started so far by this rank: the number of the next round.
    started: AtomicU64,
    meeting: Meeting,
}

/// A collective that has been started, and the matrix it works on.
#[must_use = "a started collective has to be finished"]
pub struct Pending {
    round: u64,
    call: Call,
    rows: Matrix,
}

/// An all-to-all that has been started, and its matrices.
#[must_use = "a started all-to-all has to be finished"]
pub struct Exchange {
    round: u64,
    receive_counts: Vec<usize>,
    sent: Matrix,
    received: Matrix,
}

impl LocalComm {
    /// The ends of a communicator of `size` ranks, by rank. No call waits longer than `deadline` for the other ranks.
    ///
    /// # Panics
    /// If `size` is 0.
    pub fn group(size: usize, deadline: Duration) -> Vec<LocalComm> {
        assert!(size > 0, "a communicator has at least one rank");
        let rounds = Arc::new(Rounds::new(size, deadline));
        (0..size).map(|rank| Self::end(rank, size, Meeting::Here(rounds.clone()))).collect()
    }

    /// The ends of this node's `here` ranks; every node has as many. What comes with them has to be kept as long as they.
    pub fn group_at(place: &Place, here: usize, deadline: Duration) -> Result<(Vec<LocalComm>, Side), CommError> {
        let met = hub::meet(place, here, deadline, &[])?;
        let (first, size) = (place.node * here, place.nodes * here);
        let end = |(index, meeting)| Self::end(first + index, size, meeting);
        Ok((met.meetings.into_iter().enumerate().map(end).collect(), met.side))
    }

    fn end(rank: usize, size: usize, meeting: Meeting) -> Self {
        Self { rank, size, started: AtomicU64::new(0), meeting }
    }

    fn deposit(&self, call: &Call, rows: Vec<f32>, value: u64) -> Result<u64, CommError> {
        let round = self.started.fetch_add(1, Ordering::Relaxed);
        self.meeting.deposit(round, self.rank, Deposit { call: call.clone(), rows: Arc::new(rows), value })?;
        Ok(round)
    }

    /// Starts a collective that carries one number, and awaits it.
    fn exchange(&self, call: Call, value: u64) -> Result<Vec<Deposit>, CommError> {
        let round = self.deposit(&call, Vec::new(), value)?;
        self.meeting.take(round, self.rank, call.op())
    }

    fn check_counts(&self, op: &'static str, rows: usize, counts: &[usize]) -> Result<(), CommError> {
        let wanted: usize = counts.iter().sum();
        if counts.len() != self.size || wanted > rows {
            return Err(self.refuse(op, format!("{} counts for {rows} rows", self.size), format!("{counts:?}")));
        }
        Ok(())
    }

    /// A call that is wrong by itself: the other ranks would wait for it in vain, so it ends the communicator.
    fn refuse(&self, op: &'static str, expected: String, got: String) -> CommError {
        let error = CommError::Mismatch { op, rank: self.rank, expected, got };
        self.abort(&error.to_string());
        error
    }
}

/// Copies every peer's rows to their place among `counts`.
fn place_gathered(rank: usize, counts: &[usize], deposits: &[Deposit], into: &mut Matrix) {
    let width = into.cols();
    let mut first = 0;
    for (peer, (deposit, count)) in deposits.iter().zip(counts).enumerate() {
        let elements = first * width..(first + count) * width;
        if peer != rank {
            into.data_mut()[elements].copy_from_slice(&deposit.rows);
        }
        first += count;
    }
}

/// Copies what every peer sent to `rank` to its place among `counts`.
fn place_exchanged(rank: usize, counts: &[usize], deposits: &[Deposit], into: &mut Matrix) {
    let width = into.cols();
    let mut first = 0;
    for (deposit, count) in deposits.iter().zip(counts) {
        let Call::AllToAll { send, .. } = &deposit.call else { continue };
        let from: usize = send[..rank].iter().sum();
        let sent = &deposit.rows[from * width..(from + count) * width];
        into.data_mut()[first * width..(first + count) * width].copy_from_slice(sent);
        first += count;
    }
}

/// The rows this rank brings to an all-gather.
fn own_rows(rank: usize, counts: &[usize], rows: &Matrix) -> Vec<f32> {
    let first: usize = counts[..rank].iter().sum();
    rows.data()[first * rows.cols()..(first + counts[rank]) * rows.cols()].to_vec()
}

impl Comm<Matrix, Scores> for LocalComm {
    type Pending = Pending;
    type Exchange = Exchange;

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&self, rows: Matrix, counts: &[usize]) -> Result<Pending, CommError> {
        self.check_counts("all-gather", rows.rows(), counts)?;
        let call = Call::AllGather { counts: counts.to_vec(), cols: rows.cols() };
        let round = self.deposit(&call, own_rows(self.rank, counts, &rows), 0)?;
        Ok(Pending { round, call, rows })
    }

    fn rotate(&self, rows: Matrix, send_rows: usize, receive_rows: usize) -> Result<Pending, CommError> {
        let most = send_rows.max(receive_rows);
        if most > rows.rows() {
            return Err(self.refuse("rotate", format!("{} rows at most", rows.rows()), format!("{most} rows")));
        }
        let call = Call::Rotate { send_rows, receive_rows, cols: rows.cols() };
        let sent = rows.data()[..send_rows * rows.cols()].to_vec();
        let round = self.deposit(&call, sent, 0)?;
        Ok(Pending { round, call, rows })
    }

    fn all_to_all(
        &self,
        send: Matrix,
        send_counts: &[usize],
        receive: Matrix,
        receive_counts: &[usize],
    ) -> Result<Exchange, CommError> {
        let op = "all-to-all";
        self.check_counts(op, send.rows(), send_counts)?;
        self.check_counts(op, receive.rows(), receive_counts)?;
        let cols = send.cols();
        if receive.cols() != cols {
            let got = format!("rows of {} to receive", receive.cols());
            return Err(self.refuse(op, format!("rows of {cols}, as are sent"), got));
        }
        let call = Call::AllToAll { send: send_counts.to_vec(), receive: receive_counts.to_vec(), cols };
        let rows: usize = send_counts.iter().sum();
        let round = self.deposit(&call, send.data()[..rows * cols].to_vec(), 0)?;
        Ok(Exchange { round, receive_counts: receive_counts.to_vec(), sent: send, received: receive })
    }

    fn finish_all_to_all(&self, exchange: Exchange) -> Result<(Matrix, Matrix), CommError> {
        let Exchange { round, receive_counts, sent, mut received } = exchange;
        let deposits = self.meeting.take(round, self.rank, "all-to-all")?;
        place_exchanged(self.rank, &receive_counts, &deposits, &mut received);
        Ok((sent, received))
    }

    fn finish(&self, pending: Pending) -> Result<Matrix, CommError> {
        let Pending { round, call, mut rows } = pending;
        let deposits = self.meeting.take(round, self.rank, call.op())?;
        match call {
            Call::AllGather { counts, .. } => place_gathered(self.rank, &counts, &deposits, &mut rows),
            _ => {
                let previous = &deposits[(self.rank + self.size - 1) % self.size];
                rows.data_mut()[..previous.rows.len()].copy_from_slice(&previous.rows);
            }
        }
        Ok(rows)
    }

    fn all_gather_scores(&self, rows: &mut Scores, counts: &[usize]) -> Result<(), CommError> {
        self.check_counts("all-gather of scores", rows.rows(), counts)?;
        let call = Call::AllGatherScores { counts: counts.to_vec(), cols: rows.cols() };
        let round = self.deposit(&call, own_rows(self.rank, counts, rows), 0)?;
        let deposits = self.meeting.take(round, self.rank, call.op())?;
        place_gathered(self.rank, counts, &deposits, rows);
        Ok(())
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        if root >= self.size {
            return Err(self.refuse("broadcast", format!("a root below {}", self.size), format!("{root}")));
        }
        Ok(self.exchange(Call::Broadcast { root }, value)?[root].value)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(Call::Barrier, 0).map(drop)
    }

    fn check(&self) -> Result<(), CommError> {
        self.meeting.ended(self.rank, Duration::ZERO).map_or(Ok(()), Err)
    }

    fn abort(&self, reason: &str) {
        self.meeting.abort(self.rank, reason);
    }
}

impl Drop for LocalComm {
    fn drop(&mut self) {
        self.meeting.leave(self.rank);
    }
}

#[cfg(test)]
mod tests;
