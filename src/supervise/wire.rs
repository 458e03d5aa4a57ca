//! What the daemon and the engine's process say to each other: JSON messages, each after its length in four bytes (little endian).
//!
//! Invariant: every message about a request carries its id; every id that was asked with is answered by exactly one [`Answer::Done`] or
//! [`Answer::Planned`], unless the process ends. Ids are not used again.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::{Demand, EngineError, EngineInfo, InferOutcome, InferRequest, Progress};
use crate::plan::{AttentionRequest, PrefillPlan};

/// Longest message: some ten million tokens.
const MESSAGE_BYTES: u32 = 128 << 20;

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Ask {
    /// Run it to its end.
    Infer { id: u64, request: Box<InferRequest> },
    /// Say how it would be cut.
    Plan { id: u64, context: usize, query: usize, query_at: usize, attention: AttentionRequest, new_tokens: usize },
    /// Stop this request, if it still runs or waits.
    Cancel { id: u64 },
}

/// From the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// The model is loaded. The first message.
    Ready { info: EngineInfo },
    /// The model cannot be loaded; the process ends.
    Unusable { reason: String },
    /// It can do nothing any more, and is to be replaced.
    Over { reason: String },
    /// A request goes on.
    Progress { id: u64, progress: Progress },
    /// The end of a request.
    Done { id: u64, result: Result<Box<InferOutcome>, EngineError> },
    /// The end of a request for a plan; with the memory that it needs, if the engine counts that.
    Planned { id: u64, result: Result<Box<PrefillPlan>, EngineError>, demand: Option<Demand> },
}

impl Answer {
    /// The request that it is about.
    pub fn id(&self) -> Option<u64> {
        match self {
            Self::Ready { .. } | Self::Unusable { .. } | Self::Over { .. } => None,
            Self::Progress { id, .. } | Self::Done { id, .. } | Self::Planned { id, .. } => Some(*id),
        }
    }
}

/// Writes one message.
pub fn write(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let length = u32::try_from(text.len()).ok().filter(|length| *length <= MESSAGE_BYTES);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the message is too long"))?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&text)?;
    to.flush()
}

/// Reads one message; `None` at the end of the stream.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length);
    if length > MESSAGE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long"));
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_cut_is_an_error() {
        let answer = Answer::Done { id: 7, result: Err(EngineError::Hung { seconds: 3 }) };
        let mut bytes = Vec::new();
        write(&mut bytes, &answer).expect("written");
        write(&mut bytes, &Answer::Unusable { reason: "x".to_owned() }).expect("written");
        let mut reader = bytes.as_slice();
        assert_eq!(read::<Answer>(&mut reader).expect("read"), Some(answer));
        assert!(read::<Answer>(&mut reader).expect("read").is_some());
        assert_eq!(read::<Answer>(&mut reader).expect("the end"), None);
        assert!(read::<Answer>(&mut &bytes[..20]).is_err());
        assert!(read::<Answer>(&mut &[0xff; 8][..]).is_err());
    }
}
