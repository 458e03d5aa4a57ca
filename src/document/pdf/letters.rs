//! A PDF's pages, run for the letters that they draw.
//!
//! Invariant: nothing is painted; images, paths and the outlines of letters are never decoded. Only in the process of its own may this be run on what strangers send.

use hayro_interpret::font::{Glyph, GlyphRun};
use hayro_interpret::hayro_cmap::{BfString, WritingMode};
use hayro_interpret::hayro_syntax::page::Page as PdfPage;
use hayro_interpret::hayro_syntax::{DecryptionError, LoadPdfError, Pdf};
use hayro_interpret::kurbo::{Affine, BezPath, Point, Rect};
use hayro_interpret::{
    BlendMode, ClipPath, Context, Device, DrawMode, DrawProps, Image, ImageDrawProps, InterpreterCache,
    InterpreterSettings, SoftMask, interpret_page,
};

use super::layout::{Letter, Page, whole_words};
use super::{Fault, TEXT_AT_MOST, Words};

/// Units of a font's em.
const EM: f64 = 1000.0;
/// Width of a letter whose font does not tell it.
const WIDTH: f32 = 500.0;
/// Stands for a letter that its font does not tell.
const UNKNOWN: char = '\u{fffd}';

/// The words of a PDF document.
pub fn read(bytes: Vec<u8>) -> Result<Words, Fault> {
    let pdf = Pdf::new(bytes).map_err(fault)?;
    let (cache, settings) = (InterpreterCache::new(), InterpreterSettings::default());
    let mut count = Count::default();
    let mut text = String::new();
    for page in pdf.pages().iter() {
        let mut reader = Reader { page: Page::default(), seen: seen(page), count: &mut count };
        let mut context = Context::new(Affine::IDENTITY, reader.seen, &cache, page.xref(), settings.clone());
        interpret_page(page, &mut context, &mut reader);
        let page = reader.page.text();
        if !text.is_empty() && !page.is_empty() {
            text.push_str("\n\n");
        }
        text.push_str(&page);
        if text.len() > TEXT_AT_MOST {
            return Err(Fault::TooMuchText);
        }
    }
    match (count.known, count.unknown) {
        _ if pdf.pages().is_empty() => Err(Fault::Damaged),
        (0, 0) => Err(Fault::NoText { pages: pdf.pages().len() }),
        (known, unknown) if unknown > known => Err(Fault::NoLetters),
        _ => Ok(Words { text: whole_words(&text), replaced: count.unknown }),
    }
}

fn fault(error: LoadPdfError) -> Fault {
    match error {
        LoadPdfError::Decryption(DecryptionError::PasswordProtected) => Fault::Encrypted,
        LoadPdfError::Decryption(_) => Fault::Encryption,
        LoadPdfError::Invalid => Fault::Damaged,
    }
}

/// What of the page is shown; what is drawn beside it nobody sees.
fn seen(page: &PdfPage<'_>) -> Rect {
    let shown = page.intersected_crop_box();
    Rect::new(shown.x0, shown.y0, shown.x1, shown.y1)
}

/// Letters of a document.
#[derive(Debug, Default)]
struct Count {
    known: usize,
    unknown: usize,
}

/// Collects the letters of a page.
struct Reader<'c> {
    page: Page,
    seen: Rect,
    count: &'c mut Count,
}

impl Device<'_> for Reader<'_> {
    fn draw_glyph_run(&mut self, run: &GlyphRun<'_, '_>, props: DrawProps<'_>, _: &DrawMode) {
        let is_vertical = matches!(run.writing_mode(), WritingMode::Vertical);
        for glyph in run.glyphs() {
            let Some(letter) = letter(glyph, props.transform * glyph.transform(), is_vertical) else { continue };
            if !self.seen.contains(Point::new(letter.x, letter.y)) {
                continue;
            }
            match letter.text.contains(UNKNOWN) {
                true => self.count.unknown += 1,
                false if letter.text.chars().all(char::is_whitespace) => {}
                false => self.count.known += 1,
            }
            self.page.letter(&letter);
        }
    }

    fn draw_path(&mut self, _: &BezPath, _: DrawProps<'_>, _: &DrawMode) {}
    fn draw_image(&mut self, _: Image<'_, '_>, _: ImageDrawProps<'_>) {}
    fn push_clip_path(&mut self, _: &ClipPath) {}
    fn pop_clip(&mut self) {}
    fn push_transparency_group(&mut self, _: f32, _: Option<SoftMask<'_>>, _: BlendMode) {}
    fn pop_transparency_group(&mut self) {}
}

/// A drawn shape as a letter; nothing if it has no size or no end.
fn letter(glyph: &Glyph<'_>, to_page: Affine, is_vertical: bool) -> Option<Letter> {
    let (across, up) = (Point::new(EM, 0.0), Point::new(0.0, EM));
    let (forwards, upwards) = if is_vertical { (Point::new(0.0, -EM), across) } else { (across, up) };
    let origin = to_page * Point::ORIGIN;
    let along = to_page * forwards - origin;
    let (length, size) = (along.hypot(), (to_page * upwards - origin).hypot());
    let is_real = length > 0.0 && size > 0.0 && (length + size + origin.x + origin.y).is_finite();
    let width = match glyph {
        _ if is_vertical => 1.0,
        Glyph::Outline(glyph) => f64::from(glyph.advance_width().unwrap_or(WIDTH)) / EM,
        Glyph::Type3(glyph) => f64::from(glyph.advance_width().unwrap_or(WIDTH)) / EM,
    };
    is_real.then(|| Letter {
        text: text(glyph.as_unicode()),
        x: origin.x,
        y: origin.y,
        along: (along.x / length, along.y / length),
        width: width * length,
        size,
    })
}

/// What a letter reads as: ligatures taken apart, a hyphen as one even if it was drawn as a soft one.
fn text(unicode: Option<BfString>) -> String {
    let mut text = String::new();
    let mut add = |c: char| match c {
        '\u{fb00}' => text.push_str("ff"),
        '\u{fb01}' => text.push_str("fi"),
        '\u{fb02}' => text.push_str("fl"),
        '\u{fb03}' => text.push_str("ffi"),
        '\u{fb04}' => text.push_str("ffl"),
        '\u{fb05}' | '\u{fb06}' => text.push_str("st"),
        '\u{ad}' => text.push('-'),
        c if c.is_control() => text.push(' '),
        c => text.push(c),
    };
    match unicode {
        Some(BfString::Char(c)) => add(c),
        Some(BfString::String(several)) => several.chars().for_each(add),
        None => add(UNKNOWN),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ligatures_are_taken_apart() {
        assert_eq!(text(Some(BfString::Char('\u{fb03}'))), "ffi");
        assert_eq!(text(Some(BfString::String("x\u{fb01}\u{ad}\0".to_owned()))), "xfi- ");
        assert_eq!(text(None), "\u{fffd}");
    }
}
