//! `apbd eval` as a researcher meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{QUESTION, contract};

fn eval(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
    command.args(["eval", "--threads", "2"]).args(arguments).current_dir(folder).env_remove("APBD_MODEL");
    command.output().expect("runs")
}

#[track_caller]
fn stdout(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A folder with documents and questions about them.
fn questions(lines: &[Value]) -> TempDir {
    let folder = TempDir::new().expect("a temporary directory");
    fs::write(folder.path().join("contract.md"), contract("48213", 60)).expect("written");
    fs::write(folder.path().join("other.txt"), contract("KX-4821", 20)).expect("written");
    fs::write(folder.path().join("long.txt"), "many words ".repeat(70_000)).expect("written");
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(folder.path().join("questions.jsonl"), lines).expect("written");
    folder
}

fn ask(document: &str, answer: &str) -> Value {
    json!({"document": document, "task": "ask", "question": QUESTION, "answer": answer, "kind": "fact"})
}

#[test]
fn attentions_stand_side_by_side_with_their_right_and_wrong_answers() {
    let extract = json!({
        "document": "other.txt", "task": "extract", "fields": ["reference_number"], "answer": {"reference_number": "kx-4821"}
    });
    let folder = questions(&[ask("contract.md", " 48213."), ask("other.txt", "KX-4822"), extract]);
    let arguments = ["questions.jsonl", "--attention", "full,apb", "--selector", "query-aware,none", "--hosts", "4"];
    let json = [&arguments[..], &["--format", "json", "--out", "answers.jsonl"]].concat();
    let report: Value = serde_json::from_str(&stdout(&eval(folder.path(), &json), 0)).expect("JSON");
    assert_eq!(report["questions"], 3);
    let attentions = report["attentions"].as_array().expect("a list");
    let names: Vec<&Value> = attentions.iter().map(|one| &one["attention"]).collect();
    assert_eq!(names, ["full", "apb, query-aware", "apb, none"]);
    for (one, hosts) in attentions.iter().zip([1, 4, 4]) {
        assert_eq!((&one["right"], &one["answered"], &one["failed"]), (&json!(2), &json!(3), &json!(0)), "{one}");
        assert_eq!((&one["hosts"], &one["exact"]), (&json!(hosts), &json!(hosts == 1)));
        assert_eq!(
            one["by_kind"],
            json!({"extract": {"right": 1, "answered": 1}, "fact": {"right": 1, "answered": 2}})
        );
        assert!(one["prefill_s"].as_f64() > Some(0.0) && one["tokens_out"].as_u64() > Some(0));
    }
    let answers = fs::read_to_string(folder.path().join("answers.jsonl")).expect("written");
    let answers: Vec<Value> = answers.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), 9);
    let wrong: Vec<&Value> = answers.iter().filter(|answer| answer["right"] == false).collect();
    assert!(wrong.len() == 3 && wrong.iter().all(|answer| answer["given"] == "KX-4821"), "{wrong:?}");

    let table = stdout(&eval(folder.path(), &[&arguments[..], &["--limit", "1"]].concat()), 0);
    assert!(table.contains("apb, query-aware") && table.contains("1/2 = 50.0 %") && table.contains("fact"), "{table}");
}

#[test]
fn a_document_too_long_for_the_model_is_counted_as_failed() {
    let folder = questions(&[ask("long.txt", "1"), ask("other.txt", "KX-4821")]);
    let output = eval(folder.path(), &["questions.jsonl", "--attention", "full", "--format", "json"]);
    let report: Value = serde_json::from_str(&stdout(&output, 1)).expect("JSON");
    let full = &report["attentions"][0];
    assert_eq!((&full["right"], &full["answered"], &full["failed"]), (&json!(1), &json!(1), &json!(1)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("long.txt, full: "));
}

#[test]
fn what_is_wrong_with_the_questions_is_said_with_its_line() {
    let refused = |lines: &[Value], part: &str| {
        let folder = questions(lines);
        let output = eval(folder.path(), &["questions.jsonl"]);
        stdout(&output, 64);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(part), "{said}");
    };
    refused(&[], "there is no question in it");
    refused(&[ask("other.txt", "1"), ask("gone.txt", "1")], "line 2: gone.txt: ");
    refused(&[json!({"document": "other.txt", "task": "extract", "answer": {}})], "line 1: extract needs \"fields\"");
    refused(&[json!({"document": "other.txt", "task": "ask", "answer": "1"})], "line 1: ask needs a question");
    refused(&[json!({"document": "other.txt", "task": "sing", "answer": "1"})], "line 1: ");
    stdout(&eval(Path::new("/"), &["nowhere.jsonl"]), 64);
}
