//! PDF documents to plain text, in a process of their own.
//!
//! What reads a PDF is a large library for a wild format. It is given a process ([`child`]) that may use so much memory and time and no more, and that takes nobody with
//! it when it fails: [`process`] starts it anew for each document. It is the running program, under a hidden subcommand.
//!
//! Invariant: no byte of a PDF is looked into in this process, but for its first and its last.

mod child;
mod layout;
mod letters;
mod process;

pub use child::answer;

use serde::{Deserialize, Serialize};

use super::{DecodeError, Text};

/// How every PDF begins, or nearly.
const MAGIC: &[u8] = b"%PDF-";
/// Readers have always allowed for so many bytes before [`MAGIC`].
const JUNK_AT_MOST: usize = 1024;
/// Says where the table of objects is, near a PDF's end.
const END: &[u8] = b"startxref";
/// Bytes in which [`END`] is looked for.
const TAIL: usize = 2048;
/// Bytes of text that are taken from a document.
const TEXT_AT_MOST: usize = 64 << 20;

/// What the process that reads may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Its address space.
    pub memory_bytes: u64,
    /// Time on a processor.
    pub processor_s: u64,
}

impl Default for Limits {
    /// Of both ten times what a book of 2,400 pages takes, and more.
    fn default() -> Self {
        Self { memory_bytes: 1 << 30, processor_s: 30 }
    }
}

/// The words of a PDF document.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Words {
    text: String,
    /// Letters that their fonts do not tell.
    replaced: usize,
}

/// What the process that reads has to say.
type Reply = Result<Words, Fault>;

/// Why a PDF document has no words for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Fault {
    Damaged,
    Encrypted,
    /// In a way that is not known, or not rightly.
    Encryption,
    NoText {
        pages: usize,
    },
    /// There are letters, but what they mean is not said.
    NoLetters,
    TooMuchText,
}

impl From<Fault> for DecodeError {
    fn from(fault: Fault) -> Self {
        let malformed = |reason: &str| Self::Malformed { reason: reason.to_owned() };
        match fault {
            Fault::Damaged => malformed("the PDF is damaged; no page is found in it"),
            Fault::Encrypted => Self::Encrypted,
            Fault::Encryption => malformed("the PDF is encrypted in a way that is not known"),
            Fault::NoText { pages } => Self::NoTextLayer { found: format!("no text layer in {pages} pages") },
            Fault::NoLetters => {
                Self::NoTextLayer { found: "a text layer whose fonts do not tell the letters".to_owned() }
            }
            Fault::TooMuchText => malformed(&format!("more than {} MiB of text", TEXT_AT_MOST >> 20)),
        }
    }
}

/// Whether the bytes are a PDF document. Behind other bytes the mark counts only if the name, the sender (`is_named`) or the end says so too: texts may write about it.
pub(super) fn is_one(bytes: &[u8], is_named: bool) -> bool {
    let has = |part: &[u8], mark: &[u8]| part.windows(mark.len()).any(|window| window == mark);
    let (head, tail) =
        (&bytes[..bytes.len().min(JUNK_AT_MOST + MAGIC.len())], &bytes[bytes.len().saturating_sub(TAIL)..]);
    bytes.starts_with(MAGIC) || (has(head, MAGIC) && (is_named || has(tail, END)))
}

/// The text of a PDF document, and how many of its letters could not be told.
pub(super) fn to_text(bytes: &[u8]) -> Result<(Text, usize), DecodeError> {
    let words = process::read(bytes)?;
    let mut text = Text::default();
    text.push_made(&words.text);
    Ok((text, words.replaced))
}

#[cfg(test)]
mod tests;
