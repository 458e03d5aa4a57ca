//! The table of reasons: every code, what it means for a job, and where it can be met.

use std::collections::BTreeSet;

use apbd::job::{Disposition, ErrorCode};

use crate::messages::PAGE;
use crate::text::{Table, shipped, sources, words_after};

/// Codes that files name, but in the file that defines them.
fn named_in<'a>(files: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'static str> {
    let code: String = files.into_iter().map(shipped).collect();
    let names = words_after(&code, "ErrorCode::", |c| c.is_ascii_alphanumeric());
    ErrorCode::ALL.iter().filter(|code| names.contains(&format!("{code:?}"))).map(|code| code.as_str()).collect()
}

fn is_at(table: &Table, place: &str) -> BTreeSet<&'static str> {
    let at = |code: &&ErrorCode| table.cell(code.as_str(), "where").split(", ").any(|word| word == place);
    ErrorCode::ALL.iter().filter(at).map(|code| code.as_str()).collect()
}

#[test]
fn every_code_is_there_with_its_class_and_what_follows() {
    let table = Table::of(PAGE, "code");
    let all: BTreeSet<String> = ErrorCode::ALL.iter().map(|code| code.as_str().to_owned()).collect();
    assert_eq!(table.names(), all);
    for code in ErrorCode::ALL {
        let follows = match code.disposition() {
            Disposition::Fail => "fail",
            Disposition::RetryAfter => "retry",
            Disposition::EngineFatal => "replace",
            Disposition::Requeue => "requeue",
        };
        let says = (table.cell(code.as_str(), "class"), table.cell(code.as_str(), "follows"));
        assert_eq!(says, (code.class().as_str(), follows), "{code}");
    }
}

#[test]
fn messages_are_refused_with_the_codes_of_the_table() {
    let doors = ["src/job/wire.rs", "src/intake/amqp/delivery.rs", "src/intake/amqp/session.rs"];
    assert_eq!(is_at(&Table::of(PAGE, "code"), "message"), named_in(doors));
}

#[test]
fn files_are_rejected_with_the_codes_of_the_table() {
    // A sidecar can not be read for the same reasons as a document; for these its document waits instead.
    let waits = ["document_not_found", "fetch_failed", "fetch_timed_out", "source_changed"];
    let mut named = named_in(["src/intake/dropfolder/take.rs", "src/document/fetch/mod.rs"]);
    waits.iter().for_each(|code| assert!(named.remove(code), "{code}"));
    assert_eq!(is_at(&Table::of(PAGE, "code"), "file"), named);
}

#[test]
fn jobs_end_with_the_codes_of_the_table() {
    let folders = ["src/pipeline", "src/document", "src/store"].into_iter().flat_map(sources);
    let files: Vec<String> = folders.collect();
    let named = named_in(files.iter().map(String::as_str));
    let is_requeued = |code: &&ErrorCode| code.disposition() == Disposition::Requeue;
    let requeued: BTreeSet<&str> = ErrorCode::ALL.iter().filter(is_requeued).map(|code| code.as_str()).collect();
    let table = Table::of(PAGE, "code");
    assert_eq!(is_at(&table, "event"), &named - &requeued);
    assert_eq!(is_at(&table, "inside"), &named & &requeued);
    let everywhere: Vec<String> = sources("src").into_iter().filter(|path| !path.ends_with("outcome.rs")).collect();
    let used = named_in(everywhere.iter().map(String::as_str));
    let unused: BTreeSet<&str> =
        ErrorCode::ALL.iter().map(|code| code.as_str()).filter(|code| !used.contains(code)).collect();
    assert_eq!(is_at(&table, "never"), unused);
}
