//! What a rank of another node and the hub say to each other: a header in JSON behind its length, then rows as f32; all little endian.
//!
//! Invariant: a frame that is longer than any collective is refused before it is read.

use std::io::{self, Read, Write};
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::comm::CommError;
use crate::comm::call::Call;
use crate::comm::rounds::Deposit;

/// Longest header: a call of a thousand ranks, or an order with some ten million tokens.
const HEADER_BYTES: u32 = 128 << 20;
/// Elements of a frame's rows at most.
const ELEMENTS: u64 = 1 << 32;

/// Which place at the hub somebody takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Seat {
    /// A rank, for its collectives.
    Rank(usize),
    /// A node, for what it is told to do.
    Node(usize),
}

/// From a rank or a node to the hub.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub(super) enum Say {
    /// The first word. `size` is how many ranks the other side counts.
    Hello { token: String, seat: Seat, size: usize },
    /// It comes to a round with its rows; `awaited` if it wants those of all.
    Deposit { round: u64, call: Call, value: u64, awaited: bool },
    /// It has come further.
    Further,
    /// It gives up.
    Abort { reason: String },
    /// It has done its work.
    Leave,
    /// It is still there.
    Beat,
}

/// From the hub.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "tell")]
pub(super) enum Tell {
    /// The answer to hello, once all have come; `secret` is the group's own (NCCL's unique id).
    Welcome { secret: Vec<u8> },
    /// The answer to a hello that is not right.
    Refused { reason: String },
    /// All have come to a round: their calls and words. Their rows follow, in this order.
    Taken { round: u64, deposits: Vec<Brought> },
    /// The communicator has ended.
    Ended { end: End },
    /// An order for a node.
    Order { order: serde_json::Value },
    /// The hub is still there; to a node.
    Beat,
    /// The same to a rank, with the milliseconds since any rank has come further.
    Quiet { ms: u64 },
}

/// A deposit without its rows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Brought {
    pub call: Call,
    pub value: u64,
    pub elements: usize,
}

/// A [`CommError`] on its way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "end")]
pub(super) enum End {
    Aborted { rank: usize, reason: String },
    TimedOut { seconds: u64 },
    Mismatch { expected: String, got: String },
    Failed { reason: String },
}

impl From<CommError> for End {
    fn from(error: CommError) -> Self {
        match error {
            CommError::Aborted { rank, reason } => Self::Aborted { rank, reason },
            CommError::TimedOut { seconds, .. } => Self::TimedOut { seconds },
            CommError::Mismatch { expected, got, .. } => Self::Mismatch { expected, got },
            CommError::Device { reason, .. } => Self::Failed { reason },
        }
    }
}

impl End {
    /// As `rank` meets it in `op`.
    pub fn error(self, op: &'static str, rank: usize) -> CommError {
        match self {
            Self::Aborted { rank, reason } => CommError::Aborted { rank, reason },
            Self::TimedOut { seconds } => CommError::TimedOut { op, rank, seconds },
            Self::Mismatch { expected, got } => CommError::Mismatch { op, rank, expected, got },
            Self::Failed { reason } => CommError::Device { op, reason },
        }
    }
}

/// Writes a header and the rows that belong to it.
pub(super) fn write(to: &mut impl Write, header: &impl Serialize, rows: &[&[f32]]) -> io::Result<()> {
    let text = serde_json::to_vec(header)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= HEADER_BYTES);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the header is too long"))?;
    let elements: usize = rows.iter().map(|rows| rows.len()).sum();
    let mut frame = Vec::with_capacity(12 + text.len() + 4 * elements);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&(elements as u64).to_le_bytes());
    frame.extend_from_slice(&text);
    for value in rows.iter().copied().flatten() {
        frame.extend_from_slice(&value.to_le_bytes());
    }
    to.write_all(&frame)?;
    to.flush()
}

/// Reads a header and its rows.
pub(super) fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<(T, Vec<f32>)> {
    let (mut length, mut elements) = ([0; 4], [0; 8]);
    from.read_exact(&mut length)?;
    from.read_exact(&mut elements)?;
    let (length, elements) = (u32::from_le_bytes(length), u64::from_le_bytes(elements));
    if length > HEADER_BYTES || elements > ELEMENTS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the frame is too long"));
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    let mut bytes = vec![0; 4 * elements as usize];
    from.read_exact(&mut bytes)?;
    let rows = bytes.chunks_exact(4).map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]));
    Ok((serde_json::from_slice(&text)?, rows.collect()))
}

/// Deposits as they are told, and their rows.
pub(super) fn brought(deposits: &[Deposit]) -> (Vec<Brought>, Vec<&[f32]>) {
    let of =
        |deposit: &Deposit| Brought { call: deposit.call.clone(), value: deposit.value, elements: deposit.rows.len() };
    (deposits.iter().map(of).collect(), deposits.iter().map(|deposit| &deposit.rows[..]).collect())
}

/// The opposite of [`brought`]. `None` if the rows are fewer than they should be.
pub(super) fn deposits(brought: Vec<Brought>, mut rows: Vec<f32>) -> Option<Vec<Deposit>> {
    let mut deposits = Vec::with_capacity(brought.len());
    for Brought { call, value, elements } in brought {
        if elements > rows.len() {
            return None;
        }
        let rest = rows.split_off(elements);
        deposits.push(Deposit { call, rows: Arc::new(rows), value });
        rows = rest;
    }
    Some(deposits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_as_they_went_and_cut_ones_are_errors() {
        let say = Say::Deposit { round: 3, call: Call::Broadcast { root: 1 }, value: u64::MAX, awaited: true };
        let mut bytes = Vec::new();
        write(&mut bytes, &say, &[&[1.5, -2.0], &[f32::MIN_POSITIVE]]).expect("written");
        let (read_back, rows): (Say, _) = read(&mut &bytes[..]).expect("read");
        assert_eq!(format!("{read_back:?}"), format!("{say:?}"));
        assert_eq!(rows, [1.5, -2.0, f32::MIN_POSITIVE]);
        for cut in [0, 3, 11, 20, bytes.len() - 1] {
            assert!(read::<Say>(&mut &bytes[..cut]).is_err());
        }
        assert!(read::<Say>(&mut &[0xff; 64][..]).is_err());
    }

    #[test]
    fn deposits_keep_their_rows_apart() {
        let deposit = |rows: &[f32]| Deposit { call: Call::Barrier, rows: Arc::new(rows.to_vec()), value: 7 };
        let all = [deposit(&[1.0]), deposit(&[]), deposit(&[2.0, 3.0])];
        let (told, rows) = brought(&all);
        let back = deposits(told, rows.concat()).expect("whole");
        for (back, deposit) in back.iter().zip(&all) {
            assert_eq!((&back.rows, back.value), (&deposit.rows, deposit.value));
        }
        assert!(deposits(brought(&all).0, vec![1.0, 2.0]).is_none());
    }
}
