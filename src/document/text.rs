//! Text with offsets: a document's words, and where in the source each of them stands.
//!
//! A [`Text`] is UTF-8 with `\n` line ends. Its map is a list of spans, each of which ties a run of the text to a run of source
//! bytes: byte for byte (`verbatim`), or as a whole (decoded from another encoding, an entity). What stands between spans was
//! added by a decoder (a heading's `#`, the bars of a table).
//!
//! Invariant: spans are in the order of the text, do not overlap in it, and lie on its character boundaries.

use std::ops::Range;

/// One run of the text and the source bytes it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    text: Range<usize>,
    source: Range<usize>,
    verbatim: bool,
}

/// A decoded document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    content: String,
    spans: Vec<Span>,
}

impl Text {
    /// The words.
    pub fn as_str(&self) -> &str {
        &self.content
    }

    /// The source bytes that the given bytes of the text were made of: the smallest run that is known to hold them, or
    /// nothing if they were all added by the decoder.
    pub fn source_of(&self, text: Range<usize>) -> Option<Range<usize>> {
        let first = self.spans.partition_point(|span| span.text.end <= text.start);
        let end = self.spans.partition_point(|span| span.text.start < text.end);
        self.spans
            .get(first..end)?
            .iter()
            .map(|span| span.source_within(&text))
            .reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
    }

    /// Adds words that are not in the source.
    pub(super) fn push_made(&mut self, words: &str) {
        self.content.push_str(words);
    }

    /// Adds words that stand in the source as they are, at byte `source`.
    pub(super) fn push_verbatim(&mut self, words: &str, source: usize) {
        self.push_span(words, source..source + words.len(), true);
    }

    /// Adds words that were made of the source bytes `source`.
    pub(super) fn push_derived(&mut self, words: &str, source: Range<usize>) {
        self.push_span(words, source, false);
    }

    /// Adds bytes `range` of another text, with their place in its source.
    pub(super) fn push_part(&mut self, other: &Self, range: Range<usize>) {
        let first = other.spans.partition_point(|span| span.text.end <= range.start);
        let mut done = range.start;
        for span in other.spans[first..].iter().take_while(|span| span.text.start < range.end) {
            let shared = span.text.start.max(range.start)..span.text.end.min(range.end);
            self.push_made(&other.content[done..shared.start]);
            self.push_span(&other.content[shared.clone()], span.source_within(&shared), span.verbatim);
            done = shared.end;
        }
        self.push_made(&other.content[done..range.end]);
    }

    fn push_span(&mut self, words: &str, source: Range<usize>, verbatim: bool) {
        if words.is_empty() {
            return;
        }
        let text = self.content.len()..self.content.len() + words.len();
        self.content.push_str(words);
        match self.spans.last_mut() {
            Some(last) if last.continues(&text, &source, verbatim) => {
                last.text.end = text.end;
                last.source.end = source.end;
            }
            _ => self.spans.push(Span { text, source, verbatim }),
        }
    }
}

impl Span {
    fn source_within(&self, text: &Range<usize>) -> Range<usize> {
        if !self.verbatim {
            return self.source.clone();
        }
        let skipped = text.start.saturating_sub(self.text.start);
        let end = self.text.end.min(text.end) - self.text.start;
        self.source.start + skipped..self.source.start + end
    }

    fn continues(&self, text: &Range<usize>, source: &Range<usize>, verbatim: bool) -> bool {
        self.verbatim && verbatim && self.text.end == text.start && self.source.end == source.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Text {
        let mut text = Text::default();
        text.push_made("# ");
        text.push_verbatim("Fish", 10);
        text.push_derived("&", 14..19);
        text.push_verbatim("Chips", 19);
        text
    }

    #[test]
    fn a_place_in_the_text_is_found_in_the_source() {
        let text = example();
        assert_eq!(text.as_str(), "# Fish&Chips");
        assert_eq!(text.source_of(0..2), None);
        assert_eq!(text.source_of(3..5), Some(11..13));
        assert_eq!(text.source_of(6..7), Some(14..19));
        assert_eq!(text.source_of(0..12), Some(10..24));
        assert_eq!(text.source_of(12..40), None);
    }

    #[test]
    fn a_part_keeps_its_place() {
        let text = example();
        let mut part = Text::default();
        part.push_part(&text, 1..9);
        assert_eq!(part.as_str(), " Fish&Ch");
        assert_eq!(part.source_of(1..5), Some(10..14));
        assert_eq!(part.source_of(5..6), Some(14..19));
        assert_eq!(part.source_of(6..8), Some(19..21));
    }

    #[test]
    fn what_follows_on_extends_the_span() {
        let mut text = Text::default();
        for (i, word) in ["one ", "two ", "three"].iter().enumerate() {
            text.push_verbatim(word, i * 4);
        }
        assert_eq!(text.spans.len(), 1);
        assert_eq!(text.source_of(4..7), Some(4..7));
    }
}
