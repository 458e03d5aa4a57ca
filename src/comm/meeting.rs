//! Where the ranks of a communicator meet: in this process's memory, or at the hub on the first node.
//!
//! Invariant: a rank can not tell which of the two it is.

use std::sync::Arc;
use std::time::Duration;
#[cfg(feature = "cuda")]
use std::time::Instant;

use super::CommError;
#[cfg(feature = "cuda")]
use super::call::Call;
use super::hub::Line;
use super::rounds::{Deposit, Rounds};

/// One rank's way to the others.
#[derive(Clone)]
pub(super) enum Meeting {
    /// The rounds are in this process.
    Here(Arc<Rounds>),
    /// They are on the first node.
    There(Arc<Line>),
}

impl Meeting {
    /// As [`Rounds::deposit`].
    pub fn deposit(&self, round: u64, rank: usize, deposit: Deposit) -> Result<(), CommError> {
        match self {
            Self::Here(rounds) => rounds.deposit(round, rank, deposit),
            Self::There(line) => line.deposit(round, deposit),
        }
    }

    /// As [`Rounds::take`].
    pub fn take(&self, round: u64, rank: usize, op: &'static str) -> Result<Vec<Deposit>, CommError> {
        match self {
            Self::Here(rounds) => rounds.take(round, rank, op),
            Self::There(line) => line.take(round, op),
        }
    }

    /// As [`Rounds::abort`].
    pub fn abort(&self, rank: usize, reason: &str) {
        match self {
            Self::Here(rounds) => rounds.abort(rank, reason),
            Self::There(line) => line.abort(reason),
        }
    }

    /// As [`Rounds::ended`].
    pub fn ended(&self, rank: usize, wait: Duration) -> Option<CommError> {
        match self {
            Self::Here(rounds) => rounds.ended(rank, wait),
            Self::There(line) => line.ended(wait),
        }
    }

    /// As [`Rounds::come_further`].
    pub fn come_further(&self) {
        match self {
            Self::Here(rounds) => rounds.come_further(),
            Self::There(line) => line.come_further(),
        }
    }

    /// As [`Rounds::leave`].
    pub fn leave(&self, rank: usize) {
        match self {
            Self::Here(rounds) => rounds.leave(rank),
            Self::There(line) => line.leave(),
        }
    }
}

#[cfg(feature = "cuda")]
impl Meeting {
    /// As [`Rounds::join`].
    pub fn join(&self, round: u64, rank: usize, call: Call) -> Result<(), CommError> {
        match self {
            Self::Here(rounds) => rounds.join(round, rank, call),
            Self::There(line) => line.join(round, call),
        }
    }

    /// As [`Rounds::progress`].
    pub fn progress(&self) -> Instant {
        match self {
            Self::Here(rounds) => rounds.progress(),
            Self::There(line) => line.progress(),
        }
    }

    /// As [`Rounds::fail`].
    pub fn fail(&self, rank: usize, error: &CommError) -> bool {
        match self {
            Self::Here(rounds) => rounds.fail(rank, error),
            Self::There(line) => line.fail(error),
        }
    }
}
