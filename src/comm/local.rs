//! Ranks as threads of one process.
//!
//! Every collective is a round: each rank deposits what it brings, and takes what the others brought once they have all
//! come. Starting one is depositing, so it never waits; awaiting it is taking.
//!
//! Invariant: no data is copied while the rounds are locked; a rank that waits is woken by every deposit, abort and departure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::call::{Call, Unfit};
use super::hub::{self, Place, Side};
use super::meeting::Meeting;
use super::rounds::{Deposit, Rounds};
use super::{Comm, CommError, Partials};
use crate::backend::cpu::{Matrix, Scores};

/// One rank's end of a communicator between threads. Dropping it while others wait for it aborts them.
pub struct LocalComm {
    rank: usize,
    size: usize,
    /// Collectives started so far by this rank: the number of the next round.
    started: AtomicU64,
    meeting: Meeting,
}

/// An all-gather that has been started, and the matrices it works on.
#[must_use = "a started all-gather has to be finished"]
pub struct Pending<const N: usize> {
    round: u64,
    counts: Vec<usize>,
    rows: [Matrix; N],
}

/// An all-to-all that has been started, and its matrices.
#[must_use = "a started all-to-all has to be finished"]
pub struct Exchange<const N: usize> {
    round: u64,
    receive_counts: Vec<usize>,
    sent: [Matrix; N],
    received: [Matrix; N],
}

impl LocalComm {
    /// The ends of a communicator of `size` ranks, by rank. No call waits longer than `deadline` without one of them coming further.
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

    /// For a call that is wrong by itself the other ranks would wait in vain, so it ends the communicator.
    fn checked(&self, call: Result<Call, Unfit>) -> Result<Call, CommError> {
        call.map_err(|unfit| {
            let error = unfit.on(self.rank);
            self.abort(&error.to_string());
            error
        })
    }
}

/// What a rank brings of several matrices is matrix after matrix: copies every peer's rows of each to their place among `counts`.
fn place_gathered<'a>(
    rank: usize,
    counts: &[usize],
    deposits: &[Deposit],
    into: impl IntoIterator<Item = &'a mut Matrix>,
) {
    let mut taken = vec![0; counts.len()];
    for matrix in into {
        let width = matrix.cols();
        let mut first = 0;
        for (peer, (deposit, count)) in deposits.iter().zip(counts).enumerate() {
            let brought = taken[peer]..taken[peer] + count * width;
            taken[peer] = brought.end;
            if peer != rank {
                matrix.data_mut()[first * width..(first + count) * width].copy_from_slice(&deposit.rows[brought]);
            }
            first += count;
        }
    }
}

/// Copies what every peer sent to `rank` of each matrix to its place among `counts`.
fn place_exchanged(rank: usize, counts: &[usize], deposits: &[Deposit], into: &mut [Matrix]) {
    let mut first = 0;
    for (deposit, count) in deposits.iter().zip(counts) {
        let Call::AllToAll { send, .. } = &deposit.call else { continue };
        let (before, all): (usize, usize) = (send[..rank].iter().sum(), send.iter().sum());
        let mut of_matrix = 0;
        for matrix in &mut *into {
            let width = matrix.cols();
            let from = of_matrix + before * width;
            let sent = &deposit.rows[from..from + count * width];
            matrix.data_mut()[first * width..(first + count) * width].copy_from_slice(sent);
            of_matrix += all * width;
        }
        first += count;
    }
}

/// The rows this rank brings to an all-gather.
fn own_rows<'a>(rank: usize, counts: &[usize], matrices: impl IntoIterator<Item = &'a Matrix>) -> Vec<f32> {
    let first: usize = counts[..rank].iter().sum();
    let of = |matrix: &'a Matrix| &matrix.data()[first * matrix.cols()..(first + counts[rank]) * matrix.cols()];
    matrices.into_iter().flat_map(of).copied().collect()
}

fn dimensions(matrix: &Matrix) -> (usize, usize) {
    (matrix.rows(), matrix.cols())
}

impl Comm<Matrix, Scores> for LocalComm {
    type Pending<const N: usize> = Pending<N>;
    type Exchange<const N: usize> = Exchange<N>;

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather<const N: usize>(&self, rows: [Matrix; N], counts: &[usize]) -> Result<Pending<N>, CommError> {
        let call = self.checked(Call::all_gather(self.size, &rows.each_ref().map(dimensions), counts))?;
        let round = self.deposit(&call, own_rows(self.rank, counts, &rows), 0)?;
        Ok(Pending { round, counts: counts.to_vec(), rows })
    }

    fn all_to_all<const N: usize>(
        &self,
        send: [Matrix; N],
        send_counts: &[usize],
        receive: [Matrix; N],
        receive_counts: &[usize],
    ) -> Result<Exchange<N>, CommError> {
        let [from, to] = [&send, &receive].map(|matrices| matrices.each_ref().map(dimensions));
        let call = self.checked(Call::all_to_all(self.size, (&from, send_counts), (&to, receive_counts)))?;
        let rows: usize = send_counts.iter().sum();
        let sent = send.iter().flat_map(|matrix| &matrix.data()[..rows * matrix.cols()]).copied().collect();
        let round = self.deposit(&call, sent, 0)?;
        Ok(Exchange { round, receive_counts: receive_counts.to_vec(), sent: send, received: receive })
    }

    fn finish_all_to_all<const N: usize>(
        &self,
        exchange: Exchange<N>,
    ) -> Result<([Matrix; N], [Matrix; N]), CommError> {
        let Exchange { round, receive_counts, sent, mut received } = exchange;
        let deposits = self.meeting.take(round, self.rank, "all-to-all")?;
        place_exchanged(self.rank, &receive_counts, &deposits, &mut received);
        Ok((sent, received))
    }

    fn finish<const N: usize>(&self, pending: Pending<N>) -> Result<[Matrix; N], CommError> {
        let Pending { round, counts, mut rows } = pending;
        let deposits = self.meeting.take(round, self.rank, "all-gather")?;
        place_gathered(self.rank, &counts, &deposits, &mut rows);
        Ok(rows)
    }

    fn all_gather_partials(&self, partials: Partials<'_, Matrix, Scores>, counts: &[usize]) -> Result<(), CommError> {
        let matrices = match partials {
            Partials::Attention(parts, lse) => vec![parts, &mut **lse],
            Partials::Sums(scores) | Partials::Columns(scores) => vec![&mut **scores],
        };
        let sizes: Vec<_> = matrices.iter().map(|matrix| dimensions(matrix)).collect();
        let call = self.checked(Call::all_gather_partials(self.size, &sizes, counts))?;
        let round = self.deposit(&call, own_rows(self.rank, counts, matrices.iter().map(|matrix| &**matrix)), 0)?;
        let deposits = self.meeting.take(round, self.rank, call.op())?;
        place_gathered(self.rank, counts, &deposits, matrices);
        Ok(())
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        let call = self.checked(Call::broadcast(self.size, root))?;
        Ok(self.exchange(call, value)?[root].value)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(Call::Barrier, 0).map(drop)
    }

    fn come_further(&self) {
        self.meeting.come_further();
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
pub(super) mod tests;
