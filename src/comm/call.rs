//! Which collective a rank asks for: checked by itself when it is made, and against what the other ranks ask for when they meet.
//!
//! Invariant: a call that exists fits the matrices that it was made for.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::CommError;

/// Which collective a rank called, with the sizes that have to agree; `cols` has the columns of each of its matrices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Call {
    AllGather { counts: Vec<usize>, cols: Vec<usize> },
    AllGatherPartials { counts: Vec<usize>, cols: Vec<usize> },
    Combine { rows: usize, cols: usize },
    AllToAll { send: Vec<usize>, receive: Vec<usize>, cols: Vec<usize> },
    Broadcast { root: usize },
    Barrier,
}

/// A collective that is wrong by itself, whatever the other ranks ask for.
#[derive(Debug)]
pub(super) struct Unfit {
    op: &'static str,
    expected: String,
    got: String,
}

/// Rows and columns of a matrix.
pub(super) type Dimensions = (usize, usize);

impl Unfit {
    /// As the error of the rank that asked for it.
    pub(super) fn on(self, rank: usize) -> CommError {
        let Self { op, expected, got } = self;
        CommError::Mismatch { op, rank, expected, got }
    }
}

/// One count for each of `size` ranks, and no more rows in all than there are in any of the matrices.
fn fitting(op: &'static str, size: usize, matrices: &[Dimensions], counts: &[usize]) -> Result<Vec<usize>, Unfit> {
    let rows = matrices.iter().map(|(rows, _)| *rows).min().unwrap_or(0);
    if counts.len() != size || counts.iter().sum::<usize>() > rows {
        return Err(Unfit { op, expected: format!("{size} counts for {rows} rows"), got: format!("{counts:?}") });
    }
    Ok(counts.to_vec())
}

fn cols(matrices: &[Dimensions]) -> Vec<usize> {
    matrices.iter().map(|(_, cols)| *cols).collect()
}

impl Call {
    /// An all-gather of `counts` rows of each of `size` ranks, in matrices of these dimensions.
    pub(super) fn all_gather(size: usize, matrices: &[Dimensions], counts: &[usize]) -> Result<Self, Unfit> {
        Ok(Self::AllGather { counts: fitting("all-gather", size, matrices, counts)?, cols: cols(matrices) })
    }

    /// The same of partial results, and what goes with them.
    pub(super) fn all_gather_partials(size: usize, matrices: &[Dimensions], counts: &[usize]) -> Result<Self, Unfit> {
        let counts = fitting("all-gather of partial results", size, matrices, counts)?;
        Ok(Self::AllGatherPartials { counts, cols: cols(matrices) })
    }

    /// An all-to-all among `size` ranks, from matrices to as many others, each with its counts.
    pub(super) fn all_to_all(
        size: usize,
        (sent, send_counts): (&[Dimensions], &[usize]),
        (received, receive_counts): (&[Dimensions], &[usize]),
    ) -> Result<Self, Unfit> {
        let op = "all-to-all";
        let send = fitting(op, size, sent, send_counts)?;
        let receive = fitting(op, size, received, receive_counts)?;
        let (cols, receive_cols) = (cols(sent), cols(received));
        if receive_cols != cols {
            let got = format!("rows of {receive_cols:?} to receive");
            return Err(Unfit { op, expected: format!("rows of {cols:?}, as are sent"), got });
        }
        Ok(Self::AllToAll { send, receive, cols })
    }

    /// A broadcast from `root`, one of `size` ranks.
    pub(super) fn broadcast(size: usize, root: usize) -> Result<Self, Unfit> {
        if root >= size {
            let expected = format!("a root below {size}");
            return Err(Unfit { op: "broadcast", expected, got: root.to_string() });
        }
        Ok(Self::Broadcast { root })
    }

    pub(super) fn op(&self) -> &'static str {
        match self {
            Call::AllGather { .. } => "all-gather",
            Call::AllGatherPartials { .. } => "all-gather of partial results",
            Call::Combine { .. } => "combining of partial results",
            Call::AllToAll { .. } => "all-to-all",
            Call::Broadcast { .. } => "broadcast",
            Call::Barrier => "barrier",
        }
    }

    /// Whether rank `rank` calling `self` and rank `peer` calling `other` can be the same collective.
    pub(super) fn agrees(&self, rank: usize, other: &Call, peer: usize) -> bool {
        match (self, other) {
            (
                Call::AllToAll { send, receive, cols },
                Call::AllToAll { send: peer_sends, receive: peer_receives, cols: peer_cols },
            ) => cols == peer_cols && send[peer] == peer_receives[rank] && receive[peer] == peer_sends[rank],
            _ => self == other,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::AllGather { counts, cols } | Call::AllGatherPartials { counts, cols } => {
                write!(f, "{} of {counts:?} rows of {cols:?}", self.op())
            }
            Call::AllToAll { send, receive, cols } => {
                write!(f, "all-to-all sending {send:?} and receiving {receive:?} rows of {cols:?}")
            }
            Call::Combine { rows, cols } => write!(f, "{} of {rows} rows of {cols}", self.op()),
            Call::Broadcast { root } => write!(f, "broadcast from {root}"),
            Call::Barrier => write!(f, "barrier"),
        }
    }
}
