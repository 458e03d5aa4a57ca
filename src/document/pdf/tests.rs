//! What is a PDF document; the rest is tested by the program as a whole, which alone can start itself.

use super::*;
use crate::document::{MediaType, decode};

#[test]
fn a_pdf_is_known_by_its_first_bytes() {
    assert!(is_one(b"%PDF-1.7\n...", false));
    assert!(!is_one(b"PDF", true) && !is_one(b"", true));
}

#[test]
fn behind_other_bytes_it_takes_more_to_be_one() {
    let late = [&b"\xef\xbb\xbf\r\n"[..], b"%PDF-1.4\n", &[b' '; 5000]].concat();
    assert!(is_one(&late, true) && !is_one(&late, false));
    let whole = [&late[..], b"startxref\n9\n%%EOF"].concat();
    assert!(is_one(&whole, false));
    let buried = [&[b' '; 1025][..], &whole].concat();
    assert!(!is_one(&buried, true));
}

#[test]
fn a_text_that_writes_about_pdf_is_a_text() {
    for name in ["format.txt", "format.pdf"] {
        let decoded = decode(b"Its files begin with a mark.", name, None).expect("a text");
        assert_eq!(decoded.media_type, MediaType::Text);
    }
    let decoded = decode(b"# Marks\n\nA file with `%PDF-` at its start is a PDF.", "marks.md", None).expect("a text");
    assert_eq!(decoded.media_type, MediaType::Markdown);
}

#[test]
fn faults_say_what_to_do() {
    let said = |fault: Fault| DecodeError::from(fault).to_string();
    assert_eq!(said(Fault::NoText { pages: 3 }), "no text layer in 3 pages; run OCR first");
    assert!(said(Fault::Encrypted).contains("password"));
    assert!(said(Fault::Damaged).contains("damaged"));
}
