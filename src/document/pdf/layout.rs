//! Letters with their places to lines and paragraphs.
//!
//! The order is that in which the page draws them: in nearly all documents the one in which they are read, columns one after the other. Places tell the rest: a gap
//! is a space, a jump a new line, a wide jump a new paragraph. The lines of a paragraph become one, and words that were broken at their ends whole again.
//!
//! Invariant: pure; takes time and memory in proportion to the letters.

use std::collections::HashSet;
use std::ops::Range;

/// A gap of more ems between letters is a space; kerning moves them by less.
const SPACE_EMS: f64 = 0.15;
/// The same between ideographs, which stand apart where a line was stretched.
const WIDE_SPACE_EMS: f64 = 0.6;
/// A gap of more ems is one between the cells of a table.
const CELL_EMS: f64 = 1.8;
/// Letters that go back by less are still on the same line: accents, kerning.
const BACK_EMS: f64 = 1.0;
/// So are letters that are raised or lowered by less.
const RAISED_EMS: f64 = 0.45;
/// Of two equal letters that are nearer, one was drawn to make the other look bold.
const TWICE_EMS: f64 = 0.1;
/// Lines that are so many times the usual distance apart are of two paragraphs.
const PARAGRAPH_GAP: f64 = 1.25;
/// Distances of lines, in ems, among which the usual one is looked for.
const LEADING_EMS: Range<f64> = 0.8..2.6;
/// Sizes of letters are the same up to this part of them.
const SAME_SIZE: f64 = 0.15;
/// Characters of a label before an entry of a list at most; the gap behind it makes no table.
const LABEL_CHARS: usize = 4;
/// What leads from a title to its page.
const LEADERS: [&str; 2] = [". . .", "....."];
/// Where a word was broken at a line's end; [`whole_words`] decides about its hyphen.
const BROKEN: char = '\u{ad}';

/// A letter, or a few that are drawn as one, in the page's coordinates.
#[derive(Debug, Clone)]
pub struct Letter {
    pub text: String,
    pub x: f64,
    pub y: f64,
    /// The direction of writing, of length one.
    pub along: (f64, f64),
    pub width: f64,
    pub size: f64,
}

/// Letters next to each other.
#[derive(Debug)]
struct Line {
    text: String,
    along: (f64, f64),
    left: f64,
    right: f64,
    /// Of the line the letters stand on; grows upwards.
    height: f64,
    size: f64,
    /// Where the first word ends, if there is another.
    word_end: Option<f64>,
    has_cells: bool,
}

/// A page that is being read.
#[derive(Debug, Default)]
pub struct Page {
    lines: Vec<Line>,
    /// What was drawn, and where.
    drawn: HashSet<(char, i64, i64)>,
    /// A space was drawn since the last letter.
    space: bool,
}

impl Page {
    /// Takes the next letter.
    pub fn letter(&mut self, letter: &Letter) {
        let place = |at: f64| (at / (letter.size * TWICE_EMS)).round() as i64;
        let Some(first) = letter.text.chars().next() else { return };
        if !self.drawn.insert((first, place(letter.x), place(letter.y))) {
            return;
        }
        if letter.text.chars().all(char::is_whitespace) {
            self.space = true;
            return;
        }
        let space = std::mem::take(&mut self.space);
        let (x, height) = turned(letter);
        match self.lines.last_mut() {
            Some(line) if line.takes(letter, x, height) => line.add(letter, first, x, height, space),
            _ => self.lines.push(Line::new(letter, first, x, height)),
        }
    }

    /// The page's text. Words are still broken where their lines end.
    pub fn text(&self) -> String {
        let leading = leading(&self.lines);
        let mut text = String::new();
        for block in self.lines.chunk_by(|last, line| line.follows(last, leading)) {
            if !text.is_empty() {
                text.push_str("\n\n");
            }
            write_block(block, &mut text);
        }
        text
    }
}

/// A letter's place on its line, and the line's height, as if it were written to the right.
fn turned(letter: &Letter) -> (f64, f64) {
    let (dx, dy) = letter.along;
    (letter.x * dx + letter.y * dy, letter.y * dx - letter.x * dy)
}

impl Line {
    fn new(letter: &Letter, first: char, x: f64, height: f64) -> Self {
        let right = x + letter.width;
        Self {
            text: letter.text.clone(),
            along: letter.along,
            left: x,
            right,
            height,
            size: letter.size,
            word_end: is_wide(first).then_some(right),
            has_cells: false,
        }
    }

    fn takes(&self, letter: &Letter, x: f64, height: f64) -> bool {
        let size = self.size.max(letter.size);
        let is_level = (height - self.height).abs() < RAISED_EMS * size;
        self.is_along(letter.along) && is_level && x - self.right > -BACK_EMS * size
    }

    fn is_along(&self, along: (f64, f64)) -> bool {
        self.along.0 * along.0 + self.along.1 * along.1 > 0.99
    }

    fn add(&mut self, letter: &Letter, first: char, x: f64, height: f64, space: bool) {
        let gap = self.gap(first, (x - self.right) / self.size, space);
        if !gap.is_empty() {
            self.word_end.get_or_insert(self.right);
        }
        self.text.push_str(gap);
        self.text.push_str(&letter.text);
        self.right = self.right.max(x + letter.width);
        if letter.size > self.size * (1.0 + SAME_SIZE) {
            (self.size, self.height) = (letter.size, height);
        }
    }

    /// What stands for a gap of so many ems, and the spaces drawn in it.
    fn gap(&mut self, next: char, ems: f64, space: bool) -> &'static str {
        let is_between_wide = is_wide(next) && self.text.chars().next_back().is_some_and(is_wide);
        let least = if is_between_wide { WIDE_SPACE_EMS } else { SPACE_EMS };
        if ems > CELL_EMS && self.text.chars().nth(LABEL_CHARS).is_some() {
            self.has_cells = true;
            "  "
        } else if ems > least || space {
            " "
        } else {
            ""
        }
    }

    /// By how many ems it is below another.
    fn below(&self, other: &Self) -> f64 {
        (other.height - self.height) / self.size.max(other.size)
    }

    /// Whether it belongs to the same block as the line before it.
    fn follows(&self, last: &Self, leading: f64) -> bool {
        let below = self.below(last);
        let is_same_size = (self.size - last.size).abs() <= SAME_SIZE * self.size.max(last.size);
        let is_next = below > 0.0 && below <= leading * PARAGRAPH_GAP && is_same_size;
        self.is_along(last.along) && (below.abs() < RAISED_EMS || is_next)
    }

    fn is_of_table(&self) -> bool {
        self.has_cells || LEADERS.iter().any(|leader| self.text.contains(leader))
    }
}

/// The usual distance of lines on a page, in ems.
fn leading(lines: &[Line]) -> f64 {
    let mut all: Vec<f64> = lines.windows(2).map(|pair| pair[1].below(&pair[0])).collect();
    all.retain(|below| LEADING_EMS.contains(below));
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(LEADING_EMS.end)
}

/// Writes lines that stand below each other.
fn write_block(lines: &[Line], out: &mut String) {
    let margin = lines.iter().map(|line| line.right).fold(f64::NEG_INFINITY, f64::max);
    let mut last: Option<&Line> = None;
    for line in lines {
        match last {
            None => {}
            Some(last) if line.below(last).abs() < RAISED_EMS => {
                out.push_str(if line.left >= last.right { "  " } else { "\n" });
            }
            Some(last) => join(last, line, margin, out),
        }
        out.push_str(&line.text);
        last = Some(line);
    }
}

/// Writes what stands between two lines of a block. A line that had room for the first word of the next was ended on purpose.
fn join(last: &Line, line: &Line, margin: f64, out: &mut String) {
    let word = line.word_end.unwrap_or(line.right) - line.left;
    let is_full = last.right + SPACE_EMS * last.size + word > margin;
    let (Some(end), Some(next)) = (out.chars().next_back(), line.text.chars().next()) else { return };
    if !is_full || last.is_of_table() || line.is_of_table() {
        out.push('\n');
    } else if matches!(end, '-' | '\u{2010}') && next.is_lowercase() {
        out.pop();
        out.push(if out.ends_with(char::is_alphabetic) { BROKEN } else { end });
    } else if !(is_wide(end) && is_wide(next)) {
        out.push(' ');
    }
}

/// Whether a character is of a script without spaces between words, or as wide as one.
fn is_wide(c: char) -> bool {
    matches!(c, '\u{2e80}'..='\u{a4cf}' | '\u{f900}'..='\u{faff}' | '\u{fe30}'..='\u{fe4f}' | '\u{ff00}'..='\u{ffef}')
        || matches!(c, '\u{20000}'..='\u{3ffff}')
}

/// Makes words whole that were broken at the ends of lines. The hyphen stays if the document writes the word with it elsewhere, and never without.
pub fn whole_words(text: &str) -> String {
    let broken = || words(text).filter(|word| word.contains(BROKEN));
    let wanted: HashSet<String> = broken().flat_map(|word| [plain(word), hyphenated(word)]).collect();
    let known: HashSet<&str> = words(text).filter(|word| wanted.contains(*word)).collect();
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for word in broken() {
        // Words are parts of the text, in its order.
        let at = word.as_ptr() as usize - text.as_ptr() as usize;
        let (plain, hyphenated) = (plain(word), hyphenated(word));
        let keeps_hyphen = known.contains(hyphenated.as_str()) && !known.contains(plain.as_str());
        out.push_str(&text[done..at]);
        out.push_str(if keeps_hyphen { &hyphenated } else { &plain });
        done = at + word.len();
    }
    out.push_str(&text[done..]);
    out
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '-' && c != BROKEN)
}

fn plain(word: &str) -> String {
    word.replace(BROKEN, "")
}

fn hyphenated(word: &str) -> String {
    word.replace(BROKEN, "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of 10-point lines at the given places; each letter is half an em wide.
    fn page(lines: &[(f64, f64, &str)]) -> String {
        let mut page = Page::default();
        for &(x, y, text) in lines {
            draw(&mut page, x, y, text);
        }
        page.text()
    }

    fn draw(page: &mut Page, x: f64, y: f64, text: &str) {
        for (i, c) in text.chars().enumerate() {
            let x = x + i as f64 * 5.0;
            page.letter(&Letter { text: c.to_string(), x, y, along: (1.0, 0.0), width: 5.0, size: 10.0 });
        }
    }

    #[test]
    fn lines_become_paragraphs() {
        let text = page(&[
            (50.0, 700.0, "A line that is full and"),
            (50.0, 688.0, "one that goes on to its"),
            (50.0, 676.0, "end."),
            (50.0, 652.0, "Far below is another."),
        ]);
        assert_eq!(text, "A line that is full and one that goes on to its end.\n\nFar below is another.");
    }

    #[test]
    fn a_line_with_room_left_was_ended_on_purpose() {
        let text =
            page(&[(50.0, 700.0, "Milk"), (50.0, 688.0, "Bread"), (50.0, 676.0, "Something much longer than these")]);
        assert_eq!(text, "Milk\nBread\nSomething much longer than these");
    }

    #[test]
    fn columns_follow_each_other() {
        let text = page(&[
            (50.0, 700.0, "left one"),
            (50.0, 688.0, "left two"),
            (300.0, 700.0, "right one"),
            (300.0, 688.0, "right two"),
        ]);
        assert_eq!(text, "left one left two\n\nright one right two");
    }

    #[test]
    fn gaps_are_spaces_and_wide_ones_cells() {
        let text = page(&[
            (50.0, 700.0, "Width"),
            (150.0, 700.0, "Height"),
            (50.0, 688.0, "12 mm"),
            (150.0, 688.0, "40 cm"),
            (50.0, 600.0, "near"),
            (72.5, 600.0, "by"),
        ]);
        assert_eq!(text, "Width  Height\n12 mm  40 cm\n\nnear by");
    }

    #[test]
    fn leaders_keep_the_lines_of_a_table_of_contents_apart() {
        let text = page(&[(50.0, 700.0, "One . . . . 1"), (50.0, 688.0, "Two . . . . 2")]);
        assert_eq!(text, "One . . . . 1\nTwo . . . . 2");
    }

    #[test]
    fn what_is_drawn_twice_is_there_once() {
        assert_eq!(
            page(&[(50.0, 700.0, "a bold word"), (50.2, 700.0, "a bold word"), (105.0, 700.0, ",")]),
            "a bold word,"
        );
    }

    #[test]
    fn text_may_run_in_any_direction() {
        let mut page = Page::default();
        for (i, c) in ["u", "p", " ", "!"].iter().enumerate() {
            let (text, y) = ((*c).to_owned(), 100.0 + i as f64 * 5.0);
            page.letter(&Letter { text, x: 30.0, y, along: (0.0, 1.0), width: 5.0, size: 10.0 });
        }
        draw(&mut page, 50.0, 700.0, "level");
        assert_eq!(page.text(), "up !\n\nlevel");
    }

    #[test]
    fn ideographs_are_joined_without_spaces() {
        let text = page(&[(50.0, 700.0, "漢字かな"), (50.0, 688.0, "交じり文")]);
        assert_eq!(text, "漢字かな交じり文");
    }

    #[test]
    fn broken_words_are_whole_again() {
        let text = page(&[
            (50.0, 700.0, "This is an exam-"),
            (50.0, 688.0, "ple of a well-"),
            (50.0, 676.0, "known thing, a"),
            (50.0, 664.0, "well-known one."),
        ]);
        assert_eq!(whole_words(&text), "This is an example of a well-known thing, a well-known one.");
        assert_eq!(whole_words("no word is broken"), "no word is broken");
        assert_eq!(whole_words("e\u{ad}mail, email, e-mail"), "email, email, e-mail");
    }
}
