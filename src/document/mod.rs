//! Documents: fetched from where they are, decoded to [`Text`] with offsets.
//!
//! Invariant: everything is bounded: bytes read, nesting followed, time spent; a bad document gives an error, never a panic.

mod docx;
pub mod encoding;
pub mod fetch;
pub mod html;
pub mod media;
pub mod pdf;
mod text;
mod writer;

pub use media::MediaType;
pub use text::Text;

/// Why bytes are no document that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is nothing in it.
    #[error("empty: {bytes} bytes without a word")]
    Empty { bytes: usize },
    /// Not text in any encoding.
    #[error("not UTF-8 text, nor text in another encoding: {found}")]
    NotText { found: String },
    /// A kind of document that is not supported.
    #[error("{found} cannot be read; convert it to text, Markdown, HTML, DOCX or PDF first")]
    Unsupported { found: String },
    /// Damaged, or beyond what is bearable.
    #[error("the document is malformed: {reason}")]
    Malformed { reason: String },
    /// It wants a password.
    #[error("the document is encrypted and opens with a password only; send it without one")]
    Encrypted,
    /// Pictures of pages.
    #[error("{found}; run OCR first")]
    NoTextLayer { found: String },
    /// Not the document's fault: what was to read it could not.
    #[error("the process that reads PDF documents failed: {reason}")]
    Reader { reason: String },
}

/// A document, decoded.
#[derive(Debug)]
pub struct Decoded {
    /// Its words.
    pub text: Text,
    /// What it is.
    pub media_type: MediaType,
    /// Name of the encoding it was in.
    pub encoding: &'static str,
    /// Undecodable sequences, each replaced by U+FFFD.
    pub replaced: usize,
}

/// Decodes a document. `name` gives its extension; `content_type` is what its sender or server says of it, if anything.
pub fn decode(bytes: &[u8], name: &str, content_type: Option<&str>) -> Result<Decoded, DecodeError> {
    if bytes.is_empty() {
        return Err(DecodeError::Empty { bytes: 0 });
    }
    if let Some(text) = docx::to_text(bytes)? {
        return match text.as_str().trim().is_empty() {
            true => Err(DecodeError::Empty { bytes: bytes.len() }),
            false => Ok(Decoded { text, media_type: MediaType::Docx, encoding: "UTF-8", replaced: 0 }),
        };
    }
    let named = content_type.map(media::by_name).transpose();
    let is_named_pdf = named == Ok(Some(Some(MediaType::Pdf))) || media::by_extension(name) == Some(MediaType::Pdf);
    if pdf::is_one(bytes, is_named_pdf) {
        let (text, replaced) = pdf::to_text(bytes)?;
        return Ok(Decoded { text, media_type: MediaType::Pdf, encoding: "UTF-8", replaced });
    }
    if let Some(found) = media::unreadable(bytes) {
        return Err(DecodeError::Unsupported { found: found.to_owned() });
    }
    let named = named.map_err(|found| DecodeError::Unsupported { found: format!("media type {found}") })?.flatten();
    let charset = content_type.and_then(media::charset_of).or_else(|| media::charset_in_markup(bytes));
    let encoding::Decoded { text, encoding, replaced } = encoding::decode(bytes, charset)?;
    let media_type = match named.or_else(|| media::by_extension(name)) {
        Some(MediaType::Html) if !text.as_str().contains('<') => MediaType::Text,
        Some(MediaType::Text | MediaType::Docx | MediaType::Pdf) | None if media::begins_like_html(text.as_str()) => {
            MediaType::Html
        }
        // Whatever its name says: it is text.
        Some(MediaType::Docx | MediaType::Pdf) | None => MediaType::Text,
        Some(known) => known,
    };
    let text = if media_type == MediaType::Html { html::to_text(&text)? } else { text };
    if text.as_str().trim().is_empty() {
        return Err(DecodeError::Empty { bytes: bytes.len() });
    }
    Ok(Decoded { text, media_type, encoding: encoding.name(), replaced })
}
