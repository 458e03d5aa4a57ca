//! PDF documents, written here in their own syntax, and hostile ones.

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::run::run_in;
use crate::{QUESTION, by_name, contract};

const FONT: &str = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>";
/// Characters of a line at most, and lines of a page.
const COLUMNS: usize = 90;
const LINES: usize = 45;
/// The numbers of the signals of a process that wants too much memory, and too much time.
const ABORT: i32 = 6;
const XCPU: i32 = 24;

/// A document of these objects: the first is its catalog.
fn document(objects: &[Vec<u8>], trailer: &str) -> Vec<u8> {
    let mut file = b"%PDF-1.4\n".to_vec();
    let mut table = format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1);
    for (i, object) in objects.iter().enumerate() {
        table += &format!("{:010} 00000 n \n", file.len());
        file.extend(format!("{} 0 obj\n", i + 1).bytes().chain(object.iter().copied()));
        file.extend(b"\nendobj\n");
    }
    let start = file.len();
    table += &format!("trailer\n<</Size {}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF\n", objects.len() + 1);
    file.extend(table.bytes());
    file
}

fn stream(entries: &str, data: &[u8]) -> Vec<u8> {
    let head = format!("<<{entries}/Length {}>>stream\n", data.len());
    [head.as_bytes(), data, b"\nendstream"].concat()
}

/// A document with one page, which runs this program: object 4. Objects 5 and on are `more`: the font F, the form X.
fn page(program: Vec<u8>, more: &[Vec<u8>]) -> Vec<u8> {
    let resources = "<</Font<</F 5 0 R>>/XObject<</X 6 0 R>>>>";
    let page = format!("<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources{resources}>>");
    let catalog = b"<</Type/Catalog/Pages 2 0 R>>".to_vec();
    // The page is there twice and the tree is its own child.
    let tree = b"<</Type/Pages/Kids[2 0 R 3 0 R 2 0 R 3 0 R]/Count 4>>".to_vec();
    document(&[&[catalog, tree, page.into_bytes(), program], more].concat(), "")
}

/// A text as a word processor sets it: lines of pages.
fn set(text: &str) -> Vec<u8> {
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.split("\n\n") {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if line.len() + word.len() >= COLUMNS {
                lines.push(std::mem::take(&mut line));
            }
            line += if line.is_empty() { "" } else { " " };
            line += word;
        }
        lines.extend([line, String::new()]);
    }
    let pages: Vec<&[String]> = lines.chunks(LINES).collect();
    let kids: String = (0..pages.len()).map(|i| format!("{} 0 R ", 4 + 2 * i)).collect();
    let mut objects = vec![
        b"<</Type/Catalog/Pages 2 0 R>>".to_vec(),
        format!("<</Type/Pages/Kids[{kids}]/Count {}>>", pages.len()).into_bytes(),
        FONT.as_bytes().to_vec(),
    ];
    for (i, lines) in pages.iter().enumerate() {
        let own = format!("/MediaBox[0 0 612 792]/Resources<</Font<</F 3 0 R>>>>/Contents {} 0 R", 5 + 2 * i);
        objects.push(format!("<</Type/Page/Parent 2 0 R{own}>>").into_bytes());
        let shown: String = lines.iter().map(|line| format!("({line}) Tj T*\n")).collect();
        objects.push(stream("", format!("BT /F 11 Tf 14 TL 50 740 Td\n{shown}ET").as_bytes()));
    }
    document(&objects, "")
}

/// Gibibytes of spaces, packed into megabytes: one space, and "the same again, 258 times" without an end.
fn bomb() -> Vec<u8> {
    const TIMES: usize = 13;
    let mut bits: Vec<u8> = vec![0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0];
    (0..16).for_each(|_| bits.extend([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]));
    let byte = |bits: &[u8]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | bit);
    let bytes: Vec<u8> = bits.chunks_exact(8).map(byte).collect();
    let data = [&[0x78, 0x01], &bytes[..2], &bytes[2..2 + TIMES].repeat(1 << 20)].concat();
    page(stream("/Filter/FlateDecode", &data), &[FONT.into()])
}

/// Forms that each draw the next ten times.
fn endless() -> Vec<u8> {
    let form = |next: usize| {
        let entries = format!("/Type/XObject/Subtype/Form/BBox[0 0 99 99]/Resources<</XObject<</X {next} 0 R>>>>");
        stream(&entries, "/X Do ".repeat(10).as_bytes())
    };
    let forms: Vec<Vec<u8>> = (7..27).map(form).collect();
    page(stream("", b"/X Do"), &[&[FONT.into()][..], &forms].concat())
}

/// As the daemon has it read.
fn read(arguments: &[&str], document: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
    command.arg("read-pdf").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("starts");
    // It may end before it has taken everything.
    let _ = child.stdin.take().expect("piped").write_all(document);
    child.wait_with_output().expect("ends")
}

fn reply(document: &[u8]) -> Value {
    let output = read(&[], document);
    assert!(output.status.success(), "{}", output.status);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn a_question_is_answered_from_a_pdf() {
    let folder = TempDir::new().expect("a temporary directory");
    fs::write(folder.path().join("contract.pdf"), set(&contract("48213", 120))).expect("written");
    let junk = [&b"\0\x01 from a mail\r\n"[..], &set(&contract("2718", 20))].concat();
    fs::write(folder.path().join("attached.pdf"), junk).expect("written");
    let place = TempDir::new().expect("a temporary directory");
    let ended = run_in(place.path(), &[folder.path().to_owned()], &["--ask", QUESTION, "--format", "jsonl"]);
    let records = by_name(&ended.records(0));
    assert_eq!((&records["contract.pdf"]["text"], &records["attached.pdf"]["text"]), (&json!("48213"), &json!("2718")));
}

#[test]
fn a_hostile_pdf_costs_only_itself() {
    let locked = "/ID[(0123456789abcdef)(0123456789abcdef)]/Encrypt<</Filter/Standard/V 1/R 2/P -4\
        /O(0123456789abcdef0123456789abcdef)/U(0123456789abcdef0123456789abcdef)>>";
    let good = set(&contract("31415", 20));
    let files = [
        ("good.pdf", good.clone(), Value::Null),
        ("bomb.pdf", bomb(), json!("document_corrupt")),
        ("cut.pdf", good[..60].to_vec(), json!("document_corrupt")),
        ("locked.pdf", document(&[b"<</Type/Catalog/Pages 2 0 R>>".to_vec()], locked), json!("document_encrypted")),
        ("scanned.pdf", page(stream("", b"0 0 612 792 re f"), &[FONT.into()]), json!("document_empty")),
        ("huge.pdf", b"%PDF-1.7\n1 0 obj <</Length 99999999999>> stream".to_vec(), json!("document_corrupt")),
    ];
    let folder = TempDir::new().expect("a temporary directory");
    for (name, bytes, _) in &files {
        fs::write(folder.path().join(name), bytes).expect("written");
    }
    let place = TempDir::new().expect("a temporary directory");
    let ended = run_in(place.path(), &[folder.path().to_owned()], &["--ask", QUESTION, "--format", "jsonl"]);
    let records = by_name(&ended.records(1));
    for (name, _, code) in &files {
        assert_eq!(&records[*name]["error"]["code"], code, "{name}: {}", records[*name]["error"]);
    }
    assert_eq!(records["good.pdf"]["text"], "31415");
    let said = |name: &str| records[name]["error"]["message"].as_str().expect("a message").to_owned();
    assert!(said("scanned.pdf").contains("run OCR first"), "{}", said("scanned.pdf"));
    assert!(said("locked.pdf").contains("password"), "{}", said("locked.pdf"));
}

#[test]
fn what_reads_a_pdf_is_confined() {
    assert_eq!(read(&["--memory-mib", "512"], &bomb()).status.signal(), Some(ABORT));
    assert_eq!(read(&["--processor-s", "1"], &endless()).status.signal(), Some(XCPU));
}

#[test]
fn a_cyclic_page_tree_is_walked_once() {
    let read = reply(&page(stream("", b"BT /F 9 Tf 72 700 Td (Once.) Tj ET"), &[FONT.into()]));
    assert_eq!(read, json!({ "Ok": { "text": "Once.", "replaced": 0 } }));
}

#[test]
fn nesting_without_end_is_survived() {
    let program = [b"[".repeat(1 << 20).as_slice(), b"BT /F 9 Tf 72 700 Td (Deep.) Tj ET"].concat();
    let read = reply(&page(stream("", &program), &[FONT.into()]));
    assert!(read["Ok"].is_object() || read["Err"].is_object(), "{read}");
}

#[test]
fn letters_are_what_their_fonts_say() {
    let differences = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding<</Differences[1/fi/Euro]>>>>";
    let map = b"begincmap 1 begincodespacerange <00> <ff> endcodespacerange 2 beginbfchar <41> <0416> <42> <00660066> \
        endbfchar endcmap";
    let mapped = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/ToUnicode 7 0 R>>";
    let program = b"BT /F 9 Tf 72 700 Td (pro\\001t 5 \\002) Tj 0 -11 Td /F 9 Tf [(a w)-20(ord)-400(apart)] TJ ET";
    let read = reply(&page(stream("", program), &[differences.into(), mapped.into(), stream("", map)]));
    assert_eq!(read["Ok"]["text"], "profit 5 \u{20ac}\na word apart");
    let read = reply(&page(
        stream("", b"BT /F 9 Tf 72 700 Td (AB) Tj ET"),
        &[mapped.replace('7', "6").into(), stream("", map)],
    ));
    assert_eq!(read["Ok"]["text"], "\u{416}ff");
}

#[test]
fn what_stands_beside_the_page_is_not_read() {
    let program = b"BT /F 9 Tf 72 700 Td (Seen.) Tj 900 0 Td (Unseen.) Tj ET";
    assert_eq!(reply(&page(stream("", program), &[FONT.into()]))["Ok"]["text"], "Seen.");
}
