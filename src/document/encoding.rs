//! Bytes to UTF-8: byte order mark, UTF-8, the declared charset, UTF-16 by its zero bytes, and last a guess from the bytes.
//!
//! Invariant: what is not text is refused, never turned into words.

use chardetng::{EncodingDetector, Iso2022JpDetection, Utf8Detection};
use encoding_rs::{Encoding, ISO_2022_JP, UTF_8, UTF_16BE, UTF_16LE};

use super::{DecodeError, Text};

/// Source bytes decoded at a time where the text does not map byte for byte: the grain of the offsets there.
const CHUNK_BYTES: usize = 64;
/// Bytes a decoder may hold back from one chunk to the next.
const HELD_BACK_BYTES: usize = 4;
/// Bytes looked at to tell UTF-16 without a byte order mark.
const SAMPLE_BYTES: usize = 4096;
/// More than one character in this many that no text has (controls, replacement): not text.
const CLEAN_CHARS_PER_ODD_ONE: usize = 50;

/// A decoded document and how it was decoded.
#[derive(Debug)]
pub struct Decoded {
    /// The words; line ends are `\n`.
    pub text: Text,
    /// The encoding used.
    pub encoding: &'static Encoding,
    /// Sequences that the encoding does not have, each replaced by U+FFFD.
    pub replaced: usize,
}

/// Decodes bytes. `declared` is the charset that the document or its server names, if any.
pub fn decode(bytes: &[u8], declared: Option<&'static Encoding>) -> Result<Decoded, DecodeError> {
    if bytes.starts_with(&[0xFF, 0xFE, 0, 0]) || bytes.starts_with(&[0, 0, 0xFE, 0xFF]) {
        return Err(DecodeError::NotText { found: "UTF-32 text".into() });
    }
    let (encoding, skipped) = match Encoding::for_bom(bytes) {
        Some(marked) => marked,
        None => (choose(bytes, declared)?, 0),
    };
    let decoded = decode_as(bytes, skipped, encoding);
    match odd_share(&decoded) {
        Some(found) => Err(DecodeError::NotText { found }),
        None => Ok(decoded),
    }
}

fn choose(bytes: &[u8], declared: Option<&'static Encoding>) -> Result<&'static Encoding, DecodeError> {
    if let Some(wide) = utf16_by_zeros(bytes) {
        return Ok(wide);
    }
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(DecodeError::NotText { found: format!("binary data (a zero byte at {at})") });
    }
    // ISO-2022-JP alone looks like ASCII: it switches by escape sequences that no terminal knows.
    if bytes.windows(2).any(|pair| pair == b"\x1B$") && (declared == Some(ISO_2022_JP) || guess(bytes) == ISO_2022_JP) {
        return Ok(ISO_2022_JP);
    }
    // Bytes that form UTF-8 by chance are practically unknown, wrong declarations are not.
    if Utf8Count::of(bytes).mostly() {
        return Ok(UTF_8);
    }
    match declared {
        Some(named) if named.is_ascii_compatible() && named != UTF_8 => Ok(named),
        _ => Ok(guess(bytes)),
    }
}

fn guess(bytes: &[u8]) -> &'static Encoding {
    let mut detector = EncodingDetector::new(Iso2022JpDetection::Allow);
    detector.feed(bytes, true);
    detector.guess(None, Utf8Detection::Deny)
}

/// Text in Latin script as UTF-16 has a zero in every other byte.
fn utf16_by_zeros(bytes: &[u8]) -> Option<&'static Encoding> {
    let sample = &bytes[..bytes.len().min(SAMPLE_BYTES)];
    let pairs = sample.len() / 2;
    let zeros = |offset: usize| sample.iter().skip(offset).step_by(2).filter(|&&byte| byte == 0).count();
    let (even, odd) = (zeros(0), zeros(1));
    let (many, few) = (pairs / 2, pairs / 20);
    if odd > many && even <= few {
        Some(UTF_16LE)
    } else if even > many && odd <= few {
        Some(UTF_16BE)
    } else {
        None
    }
}

/// How much of some bytes is UTF-8 beyond ASCII, and how much is not UTF-8 at all.
struct Utf8Count {
    wide: usize,
    invalid: usize,
}

impl Utf8Count {
    fn of(bytes: &[u8]) -> Self {
        let mut count = Self { wide: 0, invalid: 0 };
        for chunk in bytes.utf8_chunks() {
            count.wide += chunk.valid().chars().filter(|c| !c.is_ascii()).count();
            count.invalid += usize::from(!chunk.invalid().is_empty());
        }
        count
    }

    /// UTF-8, also if a few sequences of it are damaged.
    fn mostly(&self) -> bool {
        self.invalid == 0 || self.wide >= 20 * self.invalid
    }
}

fn decode_as(bytes: &[u8], skipped: usize, encoding: &'static Encoding) -> Decoded {
    if encoding == UTF_8 {
        return decode_utf8(bytes, skipped);
    }
    let mut text = Text::default();
    let mut lines = LineEnds::default();
    let mut replaced = 0;
    let mut decoder = encoding.new_decoder_without_bom_handling();
    let mut start = skipped;
    loop {
        let end = bytes.len().min(start + CHUNK_BYTES);
        let last = end == bytes.len();
        let chunk = &bytes[start..end];
        let room = decoder.max_utf8_buffer_length(chunk.len()).unwrap_or(CHUNK_BYTES * 4);
        let mut words = String::with_capacity(room);
        let (_, _, had_errors) = decoder.decode_to_string(chunk, &mut words, last);
        if had_errors {
            replaced += words.matches('\u{FFFD}').count();
        }
        let source = start.saturating_sub(HELD_BACK_BYTES).max(skipped)..end;
        lines.unify(&words, |piece, _| text.push_derived(piece, source.clone()));
        if last {
            return Decoded { text, encoding, replaced };
        }
        start = end;
    }
}

fn decode_utf8(bytes: &[u8], skipped: usize) -> Decoded {
    let mut text = Text::default();
    let mut lines = LineEnds::default();
    let mut replaced = 0;
    let mut at = skipped;
    for chunk in bytes[skipped..].utf8_chunks() {
        lines.unify(chunk.valid(), |piece, offset| text.push_verbatim(piece, at + offset));
        at += chunk.valid().len();
        if !chunk.invalid().is_empty() {
            text.push_derived("\u{FFFD}", at..at + chunk.invalid().len());
            at += chunk.invalid().len();
            replaced += 1;
        }
    }
    Decoded { text, encoding: UTF_8, replaced }
}

/// Turns `\r\n` and lone `\r` into `\n`, also where a piece of the text ends between the two.
#[derive(Default)]
struct LineEnds {
    after_return: bool,
}

impl LineEnds {
    fn unify(&mut self, words: &str, mut push: impl FnMut(&str, usize)) {
        let mut at = 0;
        for part in words.split_inclusive('\r') {
            let skip = usize::from(self.after_return && part.starts_with('\n'));
            let body = part.strip_suffix('\r').unwrap_or(part);
            self.after_return = body.len() < part.len();
            push(&body[skip..], at + skip);
            if self.after_return {
                push("\n", at + body.len());
            }
            at += part.len();
        }
    }
}

/// Says what the bytes seem to be if the decoded characters are not those of a text.
fn odd_share(decoded: &Decoded) -> Option<String> {
    let (mut all, mut odd) = (0, 0);
    for c in decoded.text.as_str().chars() {
        all += 1;
        odd += usize::from(c == '\u{FFFD}' || c.is_control() && !matches!(c, '\n' | '\t' | '\u{C}' | '\u{1B}'));
    }
    (odd * CLEAN_CHARS_PER_ODD_ONE > all).then(|| {
        format!(
            "no text: {odd} of {all} characters are unreadable as {}, the likeliest encoding",
            decoded.encoding.name()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UMLAUTS: &str = "Die Größe der Bücher überrascht: für Zürich gäbe es fünf schöne Märchen.\r\nZweite Zeile.";
    const JAPANESE: &str = "これは日本語の文書です。文字コードの判定を確かめるための文章をいくつか書いておきます。";
    const RUSSIAN: &str = "Это документ на русском языке, по которому определяется кодировка текста.";

    fn read(bytes: &[u8]) -> String {
        decode(bytes, None).expect("text").text.as_str().to_owned()
    }

    fn encoded(text: &str, label: &str) -> Vec<u8> {
        match Encoding::for_label(label.as_bytes()).expect("a known label") {
            e if e == UTF_16LE => text.encode_utf16().flat_map(u16::to_le_bytes).collect(),
            e if e == UTF_16BE => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
            e => e.encode(text).0.into_owned(),
        }
    }

    #[test]
    fn common_encodings_are_told_from_the_bytes_alone() {
        let cases = [
            (UMLAUTS, "utf-8"),
            (UMLAUTS, "windows-1252"),
            (UMLAUTS, "utf-16le"),
            (UMLAUTS, "utf-16be"),
            (JAPANESE, "utf-8"),
            (JAPANESE, "shift_jis"),
            (JAPANESE, "euc-jp"),
            (JAPANESE, "iso-2022-jp"),
            (RUSSIAN, "windows-1251"),
            (RUSSIAN, "koi8-r"),
        ];
        for (text, label) in cases {
            assert_eq!(read(&encoded(text, label)), text.replace("\r\n", "\n"), "{label}");
        }
    }

    #[test]
    fn a_byte_order_mark_decides_and_vanishes() {
        for (mark, label) in
            [(&b"\xEF\xBB\xBF"[..], "utf-8"), (&b"\xFF\xFE"[..], "utf-16le"), (&b"\xFE\xFF"[..], "utf-16be")]
        {
            let bytes = [mark, &encoded(RUSSIAN, label)].concat();
            assert_eq!(read(&bytes), RUSSIAN, "{label}");
        }
    }

    #[test]
    fn a_declared_charset_is_used_unless_the_bytes_are_utf8() {
        let declared = Some(encoding_rs::ISO_8859_5);
        let short = encoded("Привет", "iso-8859-5");
        assert_eq!(decode(&short, declared).expect("text").text.as_str(), "Привет");
        assert_eq!(decode("Привет".as_bytes(), declared).expect("text").encoding, UTF_8);
    }

    #[test]
    fn a_damaged_utf8_text_stays_utf8_and_says_so() {
        let mut bytes = UMLAUTS.repeat(20).into_bytes();
        bytes[3] = 0xFF;
        let decoded = decode(&bytes, None).expect("text");
        assert_eq!((decoded.encoding, decoded.replaced), (UTF_8, 1));
    }

    #[test]
    fn what_is_not_text_is_refused() {
        let noise: Vec<u8> = (0u32..4000).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
        let zeros = b"text and\0then".to_vec();
        let utf32 = [&[0xFF, 0xFE, 0, 0][..], &[65, 0, 0, 0]].concat();
        for bytes in [noise, zeros, utf32] {
            assert!(matches!(decode(&bytes, None), Err(DecodeError::NotText { .. })));
        }
    }

    #[test]
    fn offsets_lead_back_to_the_bytes() {
        let decoded = decode(UMLAUTS.as_bytes(), None).expect("text");
        let at = decoded.text.as_str().find("Zweite").expect("the second line");
        let source = decoded.text.source_of(at..at + 6).expect("a place");
        assert_eq!(&UMLAUTS.as_bytes()[source], b"Zweite");

        let wide = encoded(RUSSIAN, "utf-16le");
        let decoded = decode(&wide, None);
        // Cyrillic has no zero bytes to go by, but a mark helps.
        assert!(decoded.is_err() || decoded.is_ok_and(|d| d.encoding != UTF_16LE));
        let marked = [&b"\xFF\xFE"[..], &wide].concat();
        let text = decode(&marked, None).expect("text").text;
        let at = text.as_str().find("кодировка").expect("the word");
        let source = text.source_of(at..at + "кодировка".len()).expect("a place");
        let around = UTF_16LE.decode_without_bom_handling(&marked[source.start & !1..source.end]).0.into_owned();
        assert!(around.contains("кодировка"), "{around:?}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode(&bytes, None);
            let _ = decode(&bytes, Some(encoding_rs::SHIFT_JIS));
        }

        #[test]
        fn utf8_text_comes_back_byte_for_byte(text in "[a-zß-ÿЀ-я \n]{1,200}") {
            let decoded = decode(text.as_bytes(), None).expect("text");
            prop_assert_eq!(decoded.text.as_str(), &text);
            prop_assert_eq!(decoded.text.source_of(0..text.len()), Some(0..text.len()));
        }
    }
}
