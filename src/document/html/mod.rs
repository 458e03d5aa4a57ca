//! HTML to plain text with Markdown's headings, lists, tables and code blocks.
//!
//! html5ever's tokenizer reads the page; a stack of open elements, with the implied ends of the standard, says what is
//! visible and what breaks a paragraph. No tree is built, so that memory and time grow with the page alone, however deeply it nests.
//! The page is fed piece by piece, cut at its punctuation, so that each run of characters is known to the byte.
//!
//! If the page has a `<main>`, only what stands in it is the document.
//!
//! Invariant: every word comes from the page; scripts, styles, navigation, controls and hidden elements leave none.

mod elements;

use std::cell::RefCell;
use std::ops::Range;

use html5ever::tendril::StrTendril;
use html5ever::tokenizer::{
    BufferQueue, CharacterTokens, EndTag, NullCharacterToken, StartTag, Tag, TagToken, Token, TokenSink,
    TokenSinkResult, Tokenizer,
};

use super::writer::{Origin, Writer};
use super::{DecodeError, Text};
use elements::Role;

/// Elements open at a time; deeper ones are read as if they had no tags.
const MAX_DEPTH: usize = 512;
/// Words in one tag: the tokenizer's time grows with their square.
const MAX_TAG_WORDS: usize = 4096;

/// The text of a page.
pub fn to_text(page: &Text) -> Result<Text, DecodeError> {
    let tokenizer = Tokenizer::new(Sink(RefCell::new(Reader::new(page))), Default::default());
    let queue = BufferQueue::default();
    let source = page.as_str();
    for piece in pieces(source)? {
        tokenizer.sink.0.borrow_mut().move_to(piece.clone());
        queue.push_back(StrTendril::from(&source[piece]));
        // A script's end makes the tokenizer stop and wait; nothing is run here.
        while !queue.is_empty() {
            let _ = tokenizer.feed(&queue);
        }
    }
    tokenizer.end();
    Ok(tokenizer.sink.0.into_inner().finish())
}

/// Cuts the page behind `>` and `;` and before `<` and `&`.
fn pieces(source: &str) -> Result<Vec<Range<usize>>, DecodeError> {
    let bytes = source.as_bytes();
    let mut pieces = Vec::new();
    let (mut start, mut tag_words) = (0, None);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'<' => tag_words = Some(0),
            b'>' => tag_words = None,
            b' ' | b'\n' | b'\t' | b'/' => tag_words = tag_words.map(|words| words + 1),
            _ => {}
        }
        if tag_words.is_some_and(|words| words > MAX_TAG_WORDS) && looks_like_tag(&source[start..]) {
            return Err(DecodeError::Malformed { reason: format!("a tag with more than {MAX_TAG_WORDS} words") });
        }
        let end = match byte {
            b'<' | b'&' => at,
            b'>' | b';' => at + 1,
            _ => continue,
        };
        if end > start {
            pieces.push(start..end);
            start = end;
        }
    }
    if start < bytes.len() {
        pieces.push(start..bytes.len());
    }
    Ok(pieces)
}

/// Whether a `<` begins a tag, rather than standing in a script or a text for itself.
fn looks_like_tag(from: &str) -> bool {
    from.strip_prefix('<').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()))
}

/// Takes the tokens; a token sink is given them through a shared reference.
struct Sink<'a>(RefCell<Reader<'a>>);

impl TokenSink for Sink<'_> {
    type Handle = ();

    fn process_token(&self, token: Token, _line: u64) -> TokenSinkResult<()> {
        let mut reader = self.0.borrow_mut();
        match token {
            TagToken(tag) if tag.kind == StartTag => return reader.start_tag(&tag),
            TagToken(tag) if tag.kind == EndTag => reader.end_tag(&tag.name),
            CharacterTokens(text) => reader.characters(&text),
            NullCharacterToken => reader.characters("\u{FFFD}"),
            _ => {}
        }
        TokenSinkResult::Continue
    }
}

/// An open element.
struct Open {
    name: String,
    role: Role,
    hidden: bool,
}

struct Reader<'a> {
    page: &'a Text,
    /// Bytes of the page that the tokenizer is at.
    piece: Range<usize>,
    /// Where in the piece the next run of characters is looked for.
    cursor: usize,
    /// The last piece that began with `&`; its character may come out only when the next piece is read.
    reference: Range<usize>,
    open: Vec<Open>,
    hidden: usize,
    title: String,
    writer: Writer<'a>,
    /// What stood before `<main>`, while that is being read.
    before_main: Option<Writer<'a>>,
    main_is_over: bool,
}

impl<'a> Reader<'a> {
    fn new(page: &'a Text) -> Self {
        Self {
            page,
            piece: 0..0,
            cursor: 0,
            reference: 0..0,
            open: Vec::new(),
            hidden: 0,
            title: String::new(),
            writer: Writer::new(page),
            before_main: None,
            main_is_over: false,
        }
    }

    fn finish(mut self) -> Text {
        self.close_to(0);
        let needs_heading = self.writer.headings() == 0 && !self.writer.is_blank();
        let text = self.writer.into_text();
        let title = self.title.split_whitespace().collect::<Vec<_>>().join(" ");
        if !needs_heading || title.is_empty() {
            return text;
        }
        let mut titled = Text::default();
        titled.push_made(&format!("# {title}\n\n"));
        titled.push_part(&text, 0..text.as_str().len());
        titled
    }

    fn move_to(&mut self, piece: Range<usize>) {
        if self.page.as_str()[piece.clone()].starts_with('&') {
            self.reference = piece.clone();
        }
        self.piece = piece;
    }

    fn is_visible(&self) -> bool {
        self.hidden == 0 && !self.main_is_over
    }

    /// Inside `<svg>` and `<math>` other rules hold: any tag may close itself, and none has raw content.
    fn in_foreign(&self) -> bool {
        self.open.iter().any(|open| open.name == "svg" || open.name == "math")
    }

    fn start_tag(&mut self, tag: &Tag) -> TokenSinkResult<()> {
        let name = &*tag.name;
        self.end_implied(name);
        let hidden = elements::role(name) == Role::Hidden || elements::is_hidden(name, &tag.attrs);
        let role = elements::role(name);
        if self.is_visible() && !hidden {
            self.begin(role, tag);
        }
        let foreign = self.in_foreign();
        if elements::is_void(name) || foreign && tag.self_closing {
            return TokenSinkResult::Continue;
        }
        if self.open.len() < MAX_DEPTH {
            self.hidden += usize::from(hidden);
            self.open.push(Open { name: name.to_owned(), role, hidden });
        }
        match elements::raw_kind(name) {
            Some(kind) if !foreign => TokenSinkResult::RawData(kind),
            None if name == "plaintext" => TokenSinkResult::Plaintext,
            _ => TokenSinkResult::Continue,
        }
    }

    fn end_tag(&mut self, name: &str) {
        if name == "p" && !self.open.iter().any(|open| open.name == "p") && self.is_visible() {
            self.writer.paragraph();
        }
        let stop = self.open.iter().rposition(|open| open.name == name || elements::stops_end_tag(&open.name, name));
        if let Some(at) = stop.filter(|&at| self.open[at].name == name) {
            self.close_to(at);
        }
    }

    /// Closes what a start tag ends without saying so: `<li>` an open `<li>`.
    fn end_implied(&mut self, name: &str) {
        let (ended, barriers) = elements::ends(name);
        if ended.is_empty() {
            return;
        }
        let found = self
            .open
            .iter()
            .rposition(|open| ended.contains(&open.name.as_str()) || barriers.contains(&open.name.as_str()));
        if let Some(at) = found.filter(|&at| ended.contains(&self.open[at].name.as_str())) {
            self.close_to(at);
        }
    }

    fn close_to(&mut self, depth: usize) {
        while self.open.len() > depth {
            let Some(element) = self.open.pop() else { return };
            if element.hidden {
                self.hidden -= 1;
            } else if self.is_visible() {
                self.end(element.role);
            }
        }
    }

    /// Within code, only line breaks and its own end mean anything.
    fn means_something(&self, role: Role) -> bool {
        !self.writer.in_code() || matches!(role, Role::Preformatted | Role::Break | Role::Main)
    }

    fn begin(&mut self, role: Role, tag: &Tag) {
        if !self.means_something(role) {
            return;
        }
        let writer = &mut self.writer;
        match role {
            Role::Block | Role::Table => writer.paragraph(),
            Role::Heading(level) => writer.heading(level),
            Role::List { ordered } => writer.list_start(ordered),
            Role::Item => writer.item(),
            Role::Preformatted => writer.preformatted_start(),
            Role::Row => writer.row_start(),
            Role::Cell => writer.cell(),
            Role::Break => writer.line(),
            Role::Image => {
                let alternative = tag.attrs.iter().find(|attribute| &*attribute.name.local == "alt");
                writer.made(alternative.map_or("", |attribute| &attribute.value));
            }
            Role::Main if self.before_main.is_none() => {
                self.before_main = Some(std::mem::replace(writer, Writer::new(self.page)));
            }
            Role::Main | Role::Title | Role::Inline | Role::Hidden => {}
        }
    }

    fn end(&mut self, role: Role) {
        if !self.means_something(role) {
            return;
        }
        match role {
            Role::Block | Role::Heading(_) | Role::Table => self.writer.paragraph(),
            Role::List { .. } => self.writer.list_end(),
            Role::Preformatted => self.writer.preformatted_end(),
            Role::Row => self.writer.row_end(),
            Role::Main => self.end_main(),
            Role::Item | Role::Cell | Role::Break | Role::Image | Role::Title | Role::Inline | Role::Hidden => {}
        }
    }

    /// What follows `<main>` does not count; an empty one (filled by a script, elsewhere) does not count either.
    fn end_main(&mut self) {
        match self.before_main.take() {
            Some(before) if self.writer.is_blank() => {
                self.writer = before;
                self.writer.paragraph();
            }
            Some(_) => self.main_is_over = true,
            None => {}
        }
    }

    fn characters(&mut self, text: &str) {
        if self.open.last().is_some_and(|open| open.role == Role::Title) {
            self.title.push_str(text);
        } else if self.is_visible() {
            let origin = self.locate(text);
            self.writer.text(text, &origin);
        }
    }

    /// Where in the piece the characters stand; as a whole, if they stand there in other letters (an entity).
    fn locate(&mut self, text: &str) -> Origin {
        let from = self.cursor.max(self.piece.start);
        let found = self.page.as_str().get(from..self.piece.end).and_then(|rest| rest.find(text));
        match found {
            Some(offset) => {
                self.cursor = from + offset + text.len();
                Origin::At(from + offset)
            }
            None => Origin::From(self.reference.clone()),
        }
    }
}

#[cfg(test)]
mod tests;
