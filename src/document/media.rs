//! What kind of document some bytes are: by what they are, by their name, and by what the sender says, in this order of trust.
//!
//! Invariant: looks at the first bytes only, and never fails: what it cannot tell is plain text.

use encoding_rs::Encoding;

/// Bytes looked at for a markup's beginning and its charset declaration.
const SAMPLE_BYTES: usize = 4096;

/// The kinds of document that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MediaType {
    /// `text/plain`
    Text,
    /// `text/markdown`
    Markdown,
    /// `text/html`
    Html,
    /// A Word document.
    Docx,
    /// `application/pdf`
    Pdf,
}

/// What a Word document is called in a `Content-Type`.
const DOCX: &str = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";

impl MediaType {
    /// The name as in a `Content-Type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text/plain",
            Self::Markdown => "text/markdown",
            Self::Html => "text/html",
            Self::Docx => DOCX,
            Self::Pdf => "application/pdf",
        }
    }
}

/// Extensions of files that a folder is searched for.
pub const EXTENSIONS: &[(&str, MediaType)] = &[
    ("txt", MediaType::Text),
    ("text", MediaType::Text),
    ("log", MediaType::Text),
    ("rst", MediaType::Text),
    ("adoc", MediaType::Text),
    ("org", MediaType::Text),
    ("tex", MediaType::Text),
    ("md", MediaType::Markdown),
    ("markdown", MediaType::Markdown),
    ("mdown", MediaType::Markdown),
    ("html", MediaType::Html),
    ("htm", MediaType::Html),
    ("xhtml", MediaType::Html),
    ("docx", MediaType::Docx),
    ("pdf", MediaType::Pdf),
];

/// Kinds of file that are often taken for documents and cannot be read here, by their first bytes.
const OTHERS: &[(&[u8], &str)] = &[
    (b"%!PS", "a PostScript document"),
    (b"{\\rtf", "an RTF document"),
    (b"PK\x03\x04", "a ZIP archive or an office document other than DOCX"),
    (b"\xD0\xCF\x11\xE0\xA1\xB1\x1A\xE1", "an old or an encrypted office document"),
    (b"\x1F\x8B", "gzip data"),
    (b"BZh", "bzip2 data"),
    (b"\xFD7zXZ\0", "xz data"),
    (b"\x28\xB5\x2F\xFD", "zstd data"),
    (b"7z\xBC\xAF\x27\x1C", "a 7-Zip archive"),
    (b"\x89PNG\r\n\x1A\n", "a PNG image"),
    (b"\xFF\xD8\xFF", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\x7FELF", "an executable"),
    (b"SQLite format 3\0", "an SQLite database"),
];

/// The media type by a file name's extension.
pub fn by_extension(name: &str) -> Option<MediaType> {
    let (_, extension) = name.rsplit_once('.')?;
    EXTENSIONS.iter().find(|(known, _)| extension.eq_ignore_ascii_case(known)).map(|&(_, media)| media)
}

/// The media type by a `Content-Type`; `Err` gives back one that cannot be read.
pub fn by_name(content_type: &str) -> Result<Option<MediaType>, &str> {
    let name = content_type.split(';').next().unwrap_or_default().trim();
    match name.to_ascii_lowercase().as_str() {
        "" | "application/octet-stream" | "binary/octet-stream" => Ok(None),
        "text/plain" => Ok(Some(MediaType::Text)),
        "text/markdown" | "text/x-markdown" => Ok(Some(MediaType::Markdown)),
        "text/html" | "application/xhtml+xml" => Ok(Some(MediaType::Html)),
        DOCX => Ok(Some(MediaType::Docx)),
        "application/pdf" | "application/x-pdf" => Ok(Some(MediaType::Pdf)),
        _ => Err(name),
    }
}

/// What the bytes are if they are a known kind that cannot be read.
pub fn unreadable(bytes: &[u8]) -> Option<&'static str> {
    OTHERS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|&(_, what)| what)
}

/// Whether a text begins like an HTML page.
pub fn begins_like_html(text: &str) -> bool {
    let mut rest = text.trim_start();
    while let Some(comment) = rest.strip_prefix("<!--").or_else(|| rest.strip_prefix("<?xml")) {
        let Some((_, after)) = comment.split_once('>') else { return false };
        rest = after.trim_start();
    }
    let start: String = rest.chars().take(14).collect::<String>().to_ascii_lowercase();
    start.starts_with("<!doctype html") || start.starts_with("<html")
}

/// The charset that a `Content-Type` names.
pub fn charset_of(content_type: &str) -> Option<&'static Encoding> {
    content_type.split(';').skip(1).find_map(|parameter| {
        let (key, value) = parameter.split_once('=')?;
        key.trim().eq_ignore_ascii_case("charset").then(|| Encoding::for_label(unquoted(value).as_bytes()))?
    })
}

/// The charset that an HTML page's `<meta>` or an XML declaration names, if its bytes are ASCII-compatible.
pub fn charset_in_markup(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(SAMPLE_BYTES)]).to_ascii_lowercase();
    let declarations = head.split('<').filter(|tag| tag.starts_with("meta") || tag.starts_with("?xml"));
    declarations.filter_map(|tag| tag.split('>').next()).find_map(|tag| {
        let key = if tag.starts_with("meta") { "charset" } else { "encoding" };
        let value = tag.split_once(key)?.1.trim_start().strip_prefix('=')?;
        Encoding::for_label(unquoted(value).as_bytes())
    })
}

/// A label without what stands around it.
fn unquoted(value: &str) -> &str {
    let value = value.trim_start().trim_start_matches(['"', '\'']);
    value.split(['"', '\'', ';', ' ', '/', '?']).next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_count_in_any_case() {
        assert_eq!(by_extension("README.MD"), Some(MediaType::Markdown));
        assert_eq!(by_extension("a.b.htm"), Some(MediaType::Html));
        assert_eq!(by_extension("noextension"), None);
        assert_eq!(by_extension("picture.png"), None);
    }

    #[test]
    fn content_types_are_read_with_their_parameters() {
        assert_eq!(by_name("Text/HTML; charset=utf-8"), Ok(Some(MediaType::Html)));
        assert_eq!(by_name("application/octet-stream"), Ok(None));
        assert_eq!(by_name("application/pdf"), Ok(Some(MediaType::Pdf)));
        assert_eq!(by_name("application/rtf"), Err("application/rtf"));
        assert_eq!(charset_of("text/html; charset=\"ISO-8859-5\""), Some(encoding_rs::ISO_8859_5));
        assert_eq!(charset_of("text/html"), None);
    }

    #[test]
    fn declarations_in_the_markup_are_found() {
        let cases: &[(&str, Option<&'static Encoding>)] = &[
            ("<html><meta charset=koi8-r>", Some(encoding_rs::KOI8_R)),
            ("<META CharSet='Shift_JIS' />", Some(encoding_rs::SHIFT_JIS)),
            (
                "<meta http-equiv=content-type content=\"text/html; charset=windows-1251\">",
                Some(encoding_rs::WINDOWS_1251),
            ),
            ("<?xml version='1.0' encoding='euc-jp'?>", Some(encoding_rs::EUC_JP)),
            ("<meta charset=nonsense>", None),
            ("<p>charset=koi8-r</p>", None),
        ];
        for (markup, expected) in cases {
            assert_eq!(charset_in_markup(markup.as_bytes()), *expected, "{markup}");
        }
    }

    #[test]
    fn html_is_known_by_its_beginning() {
        assert!(begins_like_html("\n <!-- saved --> <!DOCTYPE HTML><p>"));
        assert!(begins_like_html("<?xml version='1.0'?>\n<html xmlns='x'>"));
        assert!(!begins_like_html("a <html> tag"));
        assert!(!begins_like_html("<!-- never closed"));
    }
}
