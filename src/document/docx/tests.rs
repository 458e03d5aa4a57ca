//! Word documents made here, as Word writes them, and hostile ones.

use std::io::Write;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::*;
use crate::document::{MediaType, decode};

const W: &str = "xmlns:w=\"http://schemas.openxmlformats.org/wordprocessingml/2006/main\"";
const STYLES: &str = "<w:style w:styleId=\"berschrift1\"><w:name w:val=\"heading 1\"/></w:style>\
    <w:style w:styleId=\"Own\"><w:name w:val=\"Own\"/><w:basedOn w:val=\"berschrift1\"/></w:style>\
    <w:style w:styleId=\"Level\"><w:name w:val=\"Level\"/><w:pPr><w:outlineLvl w:val=\"1\"/></w:pPr></w:style>\
    <w:style w:styleId=\"a\"><w:basedOn w:val=\"b\"/></w:style><w:style w:styleId=\"b\"><w:basedOn w:val=\"a\"/></w:style>";

fn archive(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in parts {
        writer
            .start_file(*name, SimpleFileOptions::default().compression_method(CompressionMethod::Deflated))
            .expect("starts");
        writer.write_all(bytes).expect("written");
    }
    writer.finish().expect("finished").into_inner()
}

fn docx(body: &str) -> Vec<u8> {
    let document =
        format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><w:document {W}><w:body>{body}</w:body></w:document>");
    let styles = format!("<w:styles {W}>{STYLES}</w:styles>");
    archive(&[("word/document.xml", document.as_bytes()), ("word/styles.xml", styles.as_bytes())])
}

fn text(body: &str) -> String {
    let decoded = decode(&docx(body), "letter.docx", None).expect("a document");
    assert_eq!(decoded.media_type, MediaType::Docx);
    decoded.text.as_str().to_owned()
}

fn p(style: &str, words: &str) -> String {
    format!(
        "<w:p><w:pPr><w:pStyle w:val=\"{style}\"/></w:pPr><w:r><w:t xml:space=\"preserve\">{words}</w:t></w:r></w:p>"
    )
}

#[test]
fn headings_paragraphs_and_lists_are_told_apart() {
    let entry = |level: usize, words: &str| {
        format!(
            "<w:p><w:pPr><w:numPr><w:ilvl w:val=\"{level}\"/><w:numId w:val=\"3\"/></w:numPr></w:pPr><w:r><w:t>{words}</w:t></w:r></w:p>"
        )
    };
    let body = [
        p("berschrift1", "Terms &amp; dates"),
        p("Normal", "The deadline is "),
        entry(0, "one"),
        entry(1, "two"),
        entry(0, "three"),
        p("Level", "Below"),
        p("Own", "Inherited"),
        p("a", "In a circle"),
    ];
    let expected =
        "# Terms & dates\n\nThe deadline is\n\n- one\n  - two\n- three\n\n## Below\n\n# Inherited\n\nIn a circle";
    assert_eq!(text(&body.concat()), expected);
}

#[test]
fn words_are_joined_over_runs_and_tables_have_bars() {
    let run = |words: &str| format!("<w:r><w:t xml:space=\"preserve\">{words}</w:t></w:r>");
    let cell = |words: &str| format!("<w:tc>{}</w:tc>", p("Normal", words));
    let body = format!(
        "<w:p>{}{}<w:r><w:tab/><w:t>&#8364;</w:t><w:br/><w:t>next</w:t></w:r></w:p><w:tbl><w:tr>{}{}</w:tr><w:tr>{}{}</w:tr></w:tbl>{}",
        run("dead"),
        run("line "),
        cell("Owner"),
        cell("Budget"),
        cell("Kim"),
        cell("12"),
        p("Normal", "End")
    );
    assert_eq!(text(&body), "deadline €\nnext\n\n| Owner | Budget |\n| Kim | 12 |\n\nEnd");
}

#[test]
fn what_a_reader_does_not_see_is_left_out() {
    let body = "<w:p><w:r><w:t>seen</w:t></w:r><w:del><w:r><w:delText>old</w:delText><w:t>older</w:t></w:r></w:del>\
        <w:r><w:instrText> PAGEREF x </w:instrText></w:r><mc:Fallback><w:p><w:r><w:t>twice</w:t></w:r></w:p></mc:Fallback>\
        <w:ins><w:r><w:t> new</w:t></w:r></w:ins></w:p>";
    assert_eq!(text(body), "seen new");
}

#[test]
fn the_package_says_where_its_document_is() {
    let rels = b"<Relationships><Relationship Type=\"x/relationships/officeDocument\" Target=\"/word/document2.xml\"/></Relationships>";
    let document = format!("<w:document {W}><w:p><w:r><w:t>here</w:t></w:r></w:p></w:document>");
    let bytes = archive(&[("_rels/.rels", rels), ("word/document2.xml", document.as_bytes())]);
    assert_eq!(decode(&bytes, "x", None).expect("a document").text.as_str(), "here");
}

#[test]
fn other_archives_empty_and_damaged_documents_are_named() {
    let error = |bytes: &[u8], name: &str| decode(bytes, name, None).expect_err("no document").to_string();
    assert!(error(&archive(&[("xl/workbook.xml", b"<x/>")]), "a.docx").contains("other than DOCX"));
    assert!(error(b"PK\x03\x04 and nothing more", "a.docx").contains("other than DOCX"));
    assert!(error(&docx("<w:p/>"), "a.docx").contains("without a word"));
    assert!(error(&docx("<w:p><w:r></w:p>"), "a.docx").contains("malformed"));
    let whole = docx(&p("Normal", &"words ".repeat(3000)));
    for end in (0..whole.len()).step_by(7) {
        decode(&whole[..end], "a.docx", None).expect_err("cut short");
    }
    let named_so = decode(b"only words", "a.docx", None).expect("text");
    assert_eq!(named_so.media_type, MediaType::Text);
}

#[test]
fn bombs_are_bounded() {
    let at_most = 1 << 20;
    let bomb = archive(&[("word/document.xml", &vec![b' '; 10 * at_most])]);
    assert!(bomb.len() < at_most / 50);
    let error = to_text_within(&bomb, at_most as u64).expect_err("too much").to_string();
    assert!(error.contains("word/document.xml: more than 1048576 bytes unpacked"), "{error}");
    let deep = format!("{}deep{}", "<w:p><w:r><w:t>".repeat(20_000), "</w:t></w:r></w:p>".repeat(20_000));
    assert!(text(&deep).contains("deep"));
    let entities =
        "<!DOCTYPE x [<!ENTITY a \"&b;&b;\"><!ENTITY b \"words\">]>".to_owned() + &p("Normal", "&a;&a; told");
    assert_eq!(text(&entities), "told");
}
