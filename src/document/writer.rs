//! Writes paragraphs: white space collapsed, breaks between blocks, prefixes of headings and list entries.
//!
//! Invariant: the text never begins or ends with a break, and never has more than one blank line in a row outside of code.

use std::ops::Range;

use crate::document::Text;

/// Entries are indented by two spaces a level, up to this level.
const MAX_INDENT_LEVELS: usize = 8;
const FENCE: &str = "```";

/// What stands between the text so far and what comes next; the strongest wish wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Gap {
    None,
    Space,
    Cell,
    Line,
    Paragraph,
}

/// Where a run of text comes from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// Stands there as it is, from this byte on.
    At(usize),
    /// Was made of these bytes.
    From(Range<usize>),
}

/// An open list.
#[derive(Debug)]
struct List {
    ordered: bool,
    entries: usize,
}

/// The text being written. Offsets are bytes of the decoded page.
#[derive(Debug)]
pub struct Writer<'a> {
    page: &'a Text,
    out: Text,
    gap: Gap,
    /// Words that go before the next ones: `## `, `- `.
    prefix: String,
    lists: Vec<List>,
    cells: Vec<bool>,
    preformatted: usize,
    headings: usize,
}

impl<'a> Writer<'a> {
    /// An empty text made from `page`.
    pub fn new(page: &'a Text) -> Self {
        Self {
            page,
            out: Text::default(),
            gap: Gap::None,
            prefix: String::new(),
            lists: Vec::new(),
            cells: Vec::new(),
            preformatted: 0,
            headings: 0,
        }
    }

    /// The text as it stands.
    pub fn into_text(self) -> Text {
        self.out
    }
    /// Whether no word has been written.
    pub fn is_blank(&self) -> bool {
        self.out.as_str().trim().is_empty()
    }
    /// Whether white space counts here, and structure does not.
    pub fn in_code(&self) -> bool {
        self.preformatted > 0
    }
    /// Headings written.
    pub fn headings(&self) -> usize {
        self.headings
    }

    /// Words are to stand in a paragraph of their own; in a table's cell, behind a space.
    pub fn paragraph(&mut self) {
        self.want(if self.cells.is_empty() { Gap::Paragraph } else { Gap::Space });
    }
    /// A line break.
    pub fn line(&mut self) {
        if self.preformatted > 0 {
            self.out.push_made("\n");
        } else {
            self.want(if self.cells.is_empty() { Gap::Line } else { Gap::Space });
        }
    }

    /// Begins a heading.
    pub fn heading(&mut self, level: usize) {
        self.gap = Gap::Paragraph;
        self.prefix = format!("{} ", "#".repeat(level));
        self.headings += 1;
    }

    /// Begins a list.
    pub fn list_start(&mut self, ordered: bool) {
        self.want(if self.lists.is_empty() { Gap::Paragraph } else { Gap::Line });
        self.lists.push(List { ordered, entries: 0 });
    }
    /// Ends a list.
    pub fn list_end(&mut self) {
        self.lists.pop();
        self.want(if self.lists.is_empty() { Gap::Paragraph } else { Gap::Line });
    }
    /// Begins an entry.
    pub fn item(&mut self) {
        let level = self.lists.len().clamp(1, MAX_INDENT_LEVELS) - 1;
        let mut loose = List { ordered: false, entries: 0 };
        let list = self.lists.last_mut().unwrap_or(&mut loose);
        self.gap = if list.entries == 0 { self.gap.max(Gap::Line) } else { Gap::Line };
        list.entries += 1;
        let mark = if list.ordered { format!("{}. ", list.entries) } else { "- ".to_owned() };
        self.prefix = format!("{}{mark}", "  ".repeat(level));
    }

    /// Begins a row of a table.
    pub fn row_start(&mut self) {
        self.gap = self.gap.max(Gap::Line);
        self.prefix = "| ".to_owned();
        self.cells.push(false);
    }
    /// Begins a cell.
    pub fn cell(&mut self) {
        if let Some(begun) = self.cells.last_mut()
            && std::mem::replace(begun, true)
        {
            self.flush();
            self.gap = Gap::Cell;
        }
    }
    /// Ends a row; an empty one leaves nothing.
    pub fn row_end(&mut self) {
        if self.cells.pop().is_some() {
            if self.prefix.is_empty() {
                self.out.push_made(if self.gap == Gap::Cell { " |  |" } else { " |" });
            }
            self.prefix.clear();
            self.gap = Gap::Line;
        }
    }

    /// Begins text whose white space counts.
    pub fn preformatted_start(&mut self) {
        if self.preformatted == 0 {
            self.want(Gap::Paragraph);
            self.prefix.push_str(FENCE);
            self.prefix.push('\n');
        }
        self.preformatted += 1;
    }
    /// Ends it.
    pub fn preformatted_end(&mut self) {
        let Some(outer) = self.preformatted.checked_sub(1) else { return };
        self.preformatted = outer;
        if outer > 0 {
            return;
        }
        if self.prefix.ends_with("```\n") {
            self.prefix.clear();
        } else {
            self.out.push_made(if self.out.as_str().ends_with('\n') { FENCE } else { "\n```" });
        }
        self.gap = Gap::Paragraph;
    }

    /// Words that are not on the page: an image's description.
    pub fn made(&mut self, words: &str) {
        self.words(words, &|writer, word, _| writer.out.push_made(word));
    }

    /// Text of the page.
    pub fn text(&mut self, text: &str, origin: &Origin) {
        let put = |writer: &mut Self, piece: &str, offset: usize| match origin {
            Origin::At(start) => writer.out.push_part(writer.page, start + offset..start + offset + piece.len()),
            Origin::From(range) => match writer.page.source_of(range.clone()) {
                Some(source) => writer.out.push_derived(piece, source),
                None => writer.out.push_made(piece),
            },
        };
        if self.preformatted > 0 {
            self.code(text, &put);
        } else {
            self.words(text, &put);
        }
    }

    fn code(&mut self, text: &str, put: &dyn Fn(&mut Self, &str, usize)) {
        let skipped = if self.prefix.ends_with("```\n") { usize::from(text.starts_with('\n')) } else { 0 };
        if text.len() > skipped {
            self.flush();
            put(self, &text[skipped..], skipped);
        }
    }

    fn words(&mut self, text: &str, put: &dyn Fn(&mut Self, &str, usize)) {
        let mut at = 0;
        for word in text.split(char::is_whitespace) {
            if !word.is_empty() {
                self.flush();
                put(self, word, at);
            }
            at += word.len();
            if let Some(space) = text[at..].chars().next() {
                self.want(Gap::Space);
                at += space.len_utf8();
            }
        }
    }

    /// Behind a mark that waits for its words (`- `) there is no further break.
    fn want(&mut self, gap: Gap) {
        if self.prefix.is_empty() {
            self.gap = self.gap.max(gap);
        }
    }

    /// Writes the gap and the prefix that wait for the next words.
    fn flush(&mut self) {
        let gap = match std::mem::replace(&mut self.gap, Gap::None) {
            _ if self.out.as_str().is_empty() => "",
            Gap::None => "",
            Gap::Space => " ",
            Gap::Cell => " | ",
            Gap::Line => "\n",
            Gap::Paragraph => "\n\n",
        };
        self.out.push_made(gap);
        self.out.push_made(&std::mem::take(&mut self.prefix));
    }
}
