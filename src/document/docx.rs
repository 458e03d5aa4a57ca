//! Word documents (DOCX) to plain text with Markdown's headings, lists and tables.
//!
//! A DOCX is a ZIP archive of XML parts. A heading is told by its style's name ("heading 1", whatever the style's id is in the document's language) or
//! by an outline level. Text that was deleted with changes tracked, the codes of fields, comments, notes and page headers are left out.
//!
//! Invariant: of a part no more than [`UNPACKED_AT_MOST`] bytes are unpacked; time and memory grow with them alone, however deeply they nest.

use std::collections::HashMap;
use std::io::{Cursor, Read};

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use zip::ZipArchive;
use zip::result::ZipError;

use super::writer::Writer;
use super::{DecodeError, Text};

/// Bytes of a part that are unpacked at most: the words of a thousand-page book take a tenth of it.
const UNPACKED_AT_MOST: u64 = 128 << 20;
/// Paragraphs within each other (text boxes); deeper ones are read as one.
const MAX_PARAGRAPHS: usize = 64;
/// Styles that a style is based on, one after the other.
const MAX_STYLES: usize = 16;
/// Levels of headings, as in Markdown.
const MAX_LEVEL: usize = 6;
/// Levels of lists.
const MAX_LIST_LEVEL: usize = 8;
/// What these elements hold is not what a reader sees; `Fallback` says once more what was said before it.
const UNSEEN: [&[u8]; 6] = [b"del", b"moveFrom", b"instrText", b"delText", b"Fallback", b"pPrChange"];

/// The text of a Word document, or nothing if the bytes are something else.
pub fn to_text(bytes: &[u8]) -> Result<Option<Text>, DecodeError> {
    to_text_within(bytes, UNPACKED_AT_MOST)
}

/// As [`to_text`], with parts of at most so many bytes.
fn to_text_within(bytes: &[u8], at_most: u64) -> Result<Option<Text>, DecodeError> {
    if !bytes.starts_with(b"PK\x03\x04") {
        return Ok(None);
    }
    // An archive that cannot be read is some other file, or a damaged one: in both cases no Word document.
    let Ok(mut archive) = ZipArchive::new(Cursor::new(bytes)) else { return Ok(None) };
    let main = part(&mut archive, "_rels/.rels", at_most)?
        .and_then(|rels| main_part(&rels))
        .unwrap_or("word/document.xml".into());
    let folder = main.rsplit_once('/').map_or("", |(folder, _)| folder);
    if folder != "word" {
        return Ok(None);
    }
    let Some(document) = part(&mut archive, &main, at_most)? else { return Ok(None) };
    let styles = part(&mut archive, &format!("{folder}/styles.xml"), at_most)?.unwrap_or_default();
    body(&document, &Styles::read(&styles)?).map(Some)
}

/// A part of the archive, unpacked; nothing if there is none of that name.
fn part(archive: &mut ZipArchive<Cursor<&[u8]>>, name: &str, at_most: u64) -> Result<Option<Vec<u8>>, DecodeError> {
    let file = match archive.by_name(name) {
        Ok(file) => file,
        Err(ZipError::FileNotFound) => return Ok(None),
        Err(error) => return Err(malformed(name, &error)),
    };
    let mut bytes = Vec::new();
    file.take(at_most + 1).read_to_end(&mut bytes).map_err(|error| malformed(name, &error))?;
    if bytes.len() as u64 > at_most {
        return Err(malformed(name, &format!("more than {at_most} bytes unpacked")));
    }
    Ok(Some(bytes))
}

fn malformed(part: &str, reason: &dyn std::fmt::Display) -> DecodeError {
    DecodeError::Malformed { reason: format!("{part}: {reason}") }
}

/// Where the package says that its document is.
fn main_part(rels: &[u8]) -> Option<String> {
    let mut reader = Reader::from_reader(rels);
    loop {
        match reader.read_event().ok()? {
            Event::Start(tag) | Event::Empty(tag)
                if attribute(&tag, b"Type").is_some_and(|kind| kind.ends_with("/officeDocument")) =>
            {
                return attribute(&tag, b"Target").map(|target| target.trim_start_matches('/').to_owned());
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

/// The levels of headings by the ids of their styles.
#[derive(Debug, Default)]
struct Styles(HashMap<String, usize>);

impl Styles {
    fn read(xml: &[u8]) -> Result<Self, DecodeError> {
        let (mut levels, mut based_on) = (HashMap::new(), HashMap::new());
        let (mut reader, mut id) = (Reader::from_reader(xml), String::new());
        loop {
            match reader.read_event().map_err(|error| malformed("styles.xml", &error))? {
                Event::Start(tag) | Event::Empty(tag) => match (tag.local_name().as_ref(), value(&tag)) {
                    (b"style", _) => id = attribute(&tag, b"styleId").unwrap_or_default(),
                    (b"name", Some(name)) => levels.extend(named_level(&name).map(|level| (id.clone(), level))),
                    (b"outlineLvl", Some(level)) => {
                        if let Some(level) = outline_level(&level) {
                            levels.entry(id.clone()).or_insert(level);
                        }
                    }
                    (b"basedOn", Some(other)) => based_on.extend([(id.clone(), other)]),
                    _ => {}
                },
                Event::Eof => break,
                _ => {}
            }
        }
        let inherited = |id: &String| {
            let chain = std::iter::successors(based_on.get(id), |id| based_on.get(*id));
            chain.take(MAX_STYLES).find_map(|id| levels.get(id)).copied()
        };
        let more: Vec<(String, usize)> = based_on
            .keys()
            .filter(|id| !levels.contains_key(*id))
            .filter_map(|id| Some((id.clone(), inherited(id)?)))
            .collect();
        levels.extend(more);
        Ok(Self(levels))
    }
}

/// `heading 2` is of level 2, a title stands above all.
fn named_level(name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    match name.strip_prefix("heading ") {
        Some(number) => number.parse().ok().map(|level: usize| level.clamp(1, MAX_LEVEL)),
        None => (name == "title").then_some(1),
    }
}

/// Counted from 0; 9 is body text.
fn outline_level(value: &str) -> Option<usize> {
    value.parse().ok().filter(|level| *level < 9).map(|level: usize| (level + 1).min(MAX_LEVEL))
}

/// What is known of a paragraph before its first word.
#[derive(Debug, Default)]
struct Paragraph {
    heading: Option<usize>,
    list_level: usize,
    in_list: bool,
    begun: bool,
}

/// The document's main part, being read.
struct Body<'a> {
    styles: &'a Styles,
    out: Writer<'a>,
    open: Vec<Paragraph>,
    lists: usize,
    /// Elements open below one that is not seen, itself included.
    unseen: usize,
    in_text: bool,
}

fn body(xml: &[u8], styles: &Styles) -> Result<Text, DecodeError> {
    let page = Text::default();
    let mut body = Body { styles, out: Writer::new(&page), open: Vec::new(), lists: 0, unseen: 0, in_text: false };
    let mut reader = Reader::from_reader(xml);
    loop {
        match reader.read_event().map_err(|error| malformed("document.xml", &error))? {
            Event::Start(tag) => body.start(&tag, false),
            Event::Empty(tag) => body.start(&tag, true),
            Event::End(tag) => body.end(tag.local_name().as_ref()),
            Event::Text(text) => body.words(&text.decode().map_err(|error| malformed("document.xml", &error))?),
            Event::GeneralRef(name) => {
                let name = name.decode().map_err(|error| malformed("document.xml", &error))?;
                body.words(&reference(&name).unwrap_or_default());
            }
            Event::Eof => return Ok(body.out.into_text()),
            _ => {}
        }
    }
}

impl Body<'_> {
    fn start(&mut self, tag: &BytesStart<'_>, is_empty: bool) {
        let name = tag.local_name();
        let name = name.as_ref();
        if self.unseen > 0 || UNSEEN.contains(&name) {
            self.unseen += usize::from(!is_empty);
            return;
        }
        match name {
            b"p" if !is_empty && self.open.len() < MAX_PARAGRAPHS => self.open.push(Paragraph::default()),
            b"pStyle" => {
                let level = value(tag).and_then(|style| self.styles.0.get(&style)).copied();
                self.paragraph(|paragraph| paragraph.heading = paragraph.heading.or(level));
            }
            b"outlineLvl" => {
                let level = value(tag).and_then(|level| outline_level(&level));
                self.paragraph(|paragraph| paragraph.heading = level);
            }
            b"numId" => {
                let in_list = value(tag).is_some_and(|id| id != "0");
                self.paragraph(|paragraph| paragraph.in_list = in_list);
            }
            b"ilvl" => {
                let level = value(tag).and_then(|level| level.parse().ok()).unwrap_or(0);
                self.paragraph(|paragraph| paragraph.list_level = level);
            }
            b"t" => self.in_text = !is_empty,
            b"tab" | b"ptab" => self.made(" "),
            b"noBreakHyphen" => self.made("-"),
            b"br" | b"cr" => self.out.line(),
            b"tbl" if !is_empty => self.out.paragraph(),
            b"tr" if !is_empty => {
                self.close_lists(0);
                self.out.row_start();
            }
            b"tc" => self.out.cell(),
            _ => {}
        }
    }

    fn end(&mut self, name: &[u8]) {
        if self.unseen > 0 {
            self.unseen -= 1;
            return;
        }
        match name {
            b"p" => {
                self.open.pop();
                // Behind a text box the paragraph that it stands in goes on.
                if !self.open.is_empty() {
                    self.out.paragraph();
                }
            }
            b"t" => self.in_text = false,
            b"tr" => self.out.row_end(),
            b"tbl" => self.out.paragraph(),
            _ => {}
        }
    }

    fn paragraph(&mut self, change: impl FnOnce(&mut Paragraph)) {
        if let Some(paragraph) = self.open.last_mut() {
            change(paragraph);
        }
    }

    fn words(&mut self, words: &str) {
        if self.in_text && self.unseen == 0 && !words.is_empty() {
            self.made(words);
        }
    }

    fn made(&mut self, words: &str) {
        let Some(Paragraph { heading, list_level, in_list, begun }) = self.open.last_mut() else { return };
        if !std::mem::replace(begun, true) {
            let (heading, depth) = (*heading, if *in_list { 1 + (*list_level).min(MAX_LIST_LEVEL - 1) } else { 0 });
            match heading {
                Some(level) => {
                    self.close_lists(0);
                    self.out.heading(level);
                }
                None if depth > 0 => {
                    self.close_lists(depth);
                    while self.lists < depth {
                        self.out.list_start(false);
                        self.lists += 1;
                    }
                    self.out.item();
                }
                None => {
                    self.close_lists(0);
                    self.out.paragraph();
                }
            }
        }
        self.out.made(words);
    }

    fn close_lists(&mut self, depth: usize) {
        while self.lists > depth {
            self.out.list_end();
            self.lists -= 1;
        }
    }
}

/// The attribute that most properties have.
fn value(tag: &BytesStart<'_>) -> Option<String> {
    attribute(tag, b"val")
}

fn attribute(tag: &BytesStart<'_>, name: &[u8]) -> Option<String> {
    let found = tag.attributes().flatten().find(|attribute| attribute.key.local_name().as_ref() == name)?;
    Some(String::from_utf8_lossy(&found.value).into_owned())
}

/// What a reference stands for; the XML of a DOCX has no entities of its own.
fn reference(name: &str) -> Option<String> {
    let Some(number) = name.strip_prefix('#') else {
        return quick_xml::escape::resolve_xml_entity(name).map(str::to_owned);
    };
    let code = match number.strip_prefix('x') {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok()?,
        None => number.parse().ok()?,
    };
    char::from_u32(code).map(String::from)
}

#[cfg(test)]
mod tests;
