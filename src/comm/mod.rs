//! Collectives between the ranks of one prefill.
//!
//! A [`Comm`] moves rows of the backend's matrices, of several at once where they go the same way. Collectives are started and awaited apart, so that a
//! backend can hide them behind attention. Every call is made by every rank, in the same order; a rank that fails calls [`Comm::abort`], and from then on
//! every call of every rank, also one that is already waiting, returns [`CommError::Aborted`].
//!
//! A deadline is for a wait in which nothing happens: it begins anew whenever a rank comes to a collective or says that it has come further, so that a rank
//! may have more to do than another for as long as it takes.
//!
//! Invariant: no rank can hang: every wait ends by its deadline, by an abort, or because a peer is gone.

mod call;
#[cfg(test)]
pub(crate) mod conformance;
pub mod hub;
pub mod local;
mod meeting;
#[cfg(feature = "cuda")]
pub mod nccl;
mod rounds;
pub mod solo;

use crate::backend::HeadShape;

/// Why a collective did not complete.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommError {
    /// Some rank gave up; the first reason given.
    #[error("rank {rank} aborted: {reason}")]
    Aborted { rank: usize, reason: String },
    /// The other ranks did not come, and none of them came further in the time of a deadline.
    #[error("{op}: rank {rank} waited for the other ranks, and for {seconds} s none of them came further")]
    TimedOut { op: &'static str, rank: usize, seconds: u64 },
    /// The ranks disagree on sizes or on which collective this is: a mistake in the caller.
    #[error("{op}: rank {rank} expected {expected}, a peer came with {got}")]
    Mismatch { op: &'static str, rank: usize, expected: String, got: String },
    /// The device failed.
    #[error("{op}: the device failed: {reason}")]
    Device { op: &'static str, reason: String },
}

/// What every rank has a part of, and all ranks need the parts of all.
pub enum Partials<'a, M, S> {
    /// Of attention over the keys of each: results, and their log-sum-exps.
    Attention(&'a mut M, &'a mut S),
    /// Of a product over the columns of each: what has to be added up.
    Sums(&'a mut S),
    /// Of a product, some columns of the result: what has to be put side by side.
    Columns(&'a mut S),
}

/// What makes partial results of all ranks one, everywhere in the order of the ranks, so that every rank has the same, bit for bit. All ranks ask for the
/// same rows.
pub trait Combining<M, S> {
    /// Merges partial results of attention into rows `first..first + rows` of `out`, as [`Backend::merge_stacked`](crate::backend::Backend::merge_stacked)
    /// does: this rank's are the first `rows` rows of `parts` and `lse`.
    fn merge_partials(
        &self,
        shape: HeadShape,
        rows: usize,
        partials: (&M, &S),
        into: (&mut M, usize),
    ) -> Result<(), CommError>;
    /// Adds sums to the first `rows` rows of `x`, as [`Backend::add_partials`](crate::backend::Backend::add_partials) does: this rank's are the first `rows`
    /// rows of `sums`.
    fn add_sums(&self, rows: usize, sums: &S, x: &mut M) -> Result<(), CommError>;
    /// Puts columns side by side in the first `rows` rows of `out`, as [`Backend::join_columns`](crate::backend::Backend::join_columns) does: this rank's are
    /// the first `rows` rows of `part`.
    fn join_columns(&self, rows: usize, part: &S, out: &mut S) -> Result<(), CommError>;
}

/// One rank's end of a communicator over matrices of type `M` and score matrices of type `S`.
pub trait Comm<M, S>: Send {
    /// An all-gather of `N` matrices that has been started.
    type Pending<const N: usize>;
    /// An all-to-all of `N` matrices that has been started.
    type Exchange<const N: usize>;

    /// This rank, `0..size()`.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;

    /// Starts an in-place all-gather: rank `r` has written its `counts[r]` rows at row `counts[..r].sum()` of each matrix; afterwards every
    /// rank has all of them. The matrices are handed back by [`Comm::finish`].
    fn all_gather<const N: usize>(&self, rows: [M; N], counts: &[usize]) -> Result<Self::Pending<N>, CommError>;
    /// Starts sending every rank rows of its own: to rank `p` go `send_counts[p]` rows from row `send_counts[..p].sum()` of each matrix of `send` on, and
    /// from it come `receive_counts[p]` rows, to row `receive_counts[..p].sum()` of the same one of `receive`. Counts may be 0, and a rank sends to itself
    /// too. What is sent from and what is received to are of one width. Both are handed back by [`Comm::finish_all_to_all`].
    fn all_to_all<const N: usize>(
        &self,
        send: [M; N],
        send_counts: &[usize],
        receive: [M; N],
        receive_counts: &[usize],
    ) -> Result<Self::Exchange<N>, CommError>;
    /// One step of a ring: starts sending the first `send_rows` rows of `send` to the next rank (`rank + 1`, the last to 0) and receiving
    /// `receive_rows` rows of the previous one at the top of `receive`. It is an all-to-all, and finished as one.
    fn rotate<const N: usize>(
        &self,
        send: [M; N],
        send_rows: usize,
        receive: [M; N],
        receive_rows: usize,
    ) -> Result<Self::Exchange<N>, CommError> {
        let (rank, size) = (self.rank(), self.size());
        let only = |peer: usize, rows: usize| (0..size).map(|other| if other == peer { rows } else { 0 }).collect();
        let (sent, received): (Vec<usize>, Vec<usize>) =
            (only((rank + 1) % size, send_rows), only((rank + size - 1) % size, receive_rows));
        self.all_to_all(send, &sent, receive, &received)
    }
    /// Awaits a started all-to-all, and hands back what was sent (contents undefined) and what was received.
    fn finish_all_to_all<const N: usize>(&self, exchange: Self::Exchange<N>) -> Result<([M; N], [M; N]), CommError>;
    /// Awaits a started all-gather.
    fn finish<const N: usize>(&self, pending: Self::Pending<N>) -> Result<[M; N], CommError>;
    /// In-place all-gather of partial results, awaited at once; `counts` as above, of the rows of all that goes with them.
    fn all_gather_partials(&self, partials: Partials<'_, M, S>, counts: &[usize]) -> Result<(), CommError>;
    /// How `rows` rows of `width` elements of partial results become one without being gathered first, where this communicator can do that; the same on every
    /// rank.
    fn combining(&self, _rows: usize, _width: usize) -> Option<&dyn Combining<M, S>> {
        None
    }
    /// Every rank returns what `root` gave.
    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError>;
    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<(), CommError>;
    /// Tells ranks that wait for this one that it has come further. To be called when the device has done something, not when it is asked to. Waits for
    /// nobody.
    fn come_further(&self);
    /// Whether the communicator still stands. A device may take what an aborted collective left for its result: to be asked after a wait for the
    /// device, before what came of it is used. Waits for nobody.
    fn check(&self) -> Result<(), CommError>;
    /// Ends the communicator for every rank; the first reason is kept.
    fn abort(&self, reason: &str);
}
