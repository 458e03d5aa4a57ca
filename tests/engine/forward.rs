//! `apbd forward` as people run it: a process, a file in, one JSON object out.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const GOLDEN: &str = "llama-3.1";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/goldens").join(GOLDEN)
}

fn forward(arguments: &[&str]) -> Output {
    let golden = model().join("golden.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
    command.args(["forward", "--threads", "2", "--model"]).arg(model()).arg("--input").arg(golden).args(arguments);
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn logits(output: &Value) -> Vec<f64> {
    output["last_logits"].as_array().unwrap().iter().map(|logit| logit.as_f64().unwrap()).collect()
}

/// Exit code and what was said.
fn refusal(output: &Output) -> (Option<i32>, String) {
    assert!(output.stdout.is_empty());
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn gives_what_transformers_gives() {
    let golden: Value = serde_json::from_slice(&std::fs::read(model().join("golden.json")).unwrap()).unwrap();
    let output = json(&forward(&["--attention", "full", "--steps", "8"]));
    assert_eq!(output["greedy"], golden["greedy"]);
    assert_eq!(logits(&output).len(), logits(&golden).len());
    assert_eq!(output["plan"]["mode"], "full");
    assert!(output["prefill_ms"].as_f64().unwrap() > 0.0 && output["decode_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn ranks_change_nothing_but_rounding() {
    for attention in ["ring", "star", "apb"] {
        let run = |ranks: &str| {
            let cut = ["--hosts", "5", "--ranks", ranks, "--steps", "4", "--query-at", "3", "--attention", attention];
            let apb = ["--anchor", "32", "--passing", "6", "--selector", "query-aware"];
            let more = if attention == "apb" { &apb[..] } else { &[] };
            json(&forward(&[&cut[..], more].concat()))
        };
        let one = run("1");
        assert_eq!(one["plan"]["hosts"].as_array().unwrap().len(), 5);
        for ranks in ["2", "3", "8"] {
            let several = run(ranks);
            assert_eq!(
                (&several["greedy"], &several["plan"]),
                (&one["greedy"], &one["plan"]),
                "{attention} on {ranks}"
            );
            let difference = logits(&several).iter().zip(logits(&one)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(difference < 1e-4, "{attention} on {ranks} ranks: {difference:e}");
        }
    }
}

#[test]
fn the_plan_says_what_it_did_with_the_query() {
    let apb = ["--attention", "apb", "--hosts", "4", "--anchor", "24", "--passing", "4", "--selector", "random"];
    let with = json(&forward(&[&apb[..], &["--seed", "9"]].concat()));
    assert_eq!((&with["plan"]["anchor"]["has_query"], &with["plan"]["notes"]), (&json!(true), &json!([])));
    assert_eq!(with["plan"]["selector"], json!({"kind": "random", "seed": 9}));
    let without = json(&forward(&[&apb[..], &["--no-query-in-anchor"]].concat()));
    assert_eq!(without["plan"]["anchor"]["has_query"], json!(false));
    let pushed_out = json(&forward(&[&apb[..], &["--query-at", "10"]].concat()));
    assert!(pushed_out["plan"]["notes"][0].as_str().unwrap().contains("left out of the anchor"));
}

#[test]
fn what_can_not_work_is_a_usage_error_with_its_reason() {
    let cases: [(&[&str], &str); 6] = [
        (&["--backend", "cuda"], "not in this build"),
        (&["--attention", "apb", "--selector", "retaining-head"], "no retaining heads"),
        (&["--attention", "apb", "--hosts", "0"], "0 hosts"),
        (&["--query-at", "9999"], "9999 tokens"),
        (&["--ranks", "0"], "--ranks"),
        (&["--steps", "4000"], "positions of the model"),
    ];
    for (arguments, reason) in cases {
        if cfg!(feature = "cuda") && arguments.contains(&"cuda") {
            continue;
        }
        let (code, said) = refusal(&forward(arguments));
        assert!(code == Some(64) && said.contains(reason), "{arguments:?}: {code:?} {said}");
    }
}

/// Runs with this on stdin.
fn forward_from_stdin(input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
    command.args(["forward", "--input", "-", "--model"]).arg(model());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn bad_input_is_named() {
    assert_eq!(
        json(&forward_from_stdin(r#"{"context": [1, 2, 3], "query": [4]}"#))["greedy"].as_array().unwrap().len(),
        1
    );
    let cases = [
        ("", "--input -"),
        (r#"{"context": [1]}"#, "query"),
        (r#"{"context": [1, 128], "query": [2]}"#, "token 128 is not in the model's vocabulary of 128"),
        (r#"{"context": [], "query": [2]}"#, "the context has no tokens"),
        (r#"{"context": [2], "query": []}"#, "the query has no tokens"),
    ];
    for (input, reason) in cases {
        let (code, said) = refusal(&forward_from_stdin(input));
        assert!(code == Some(64) && said.contains(reason), "{input}: {code:?} {said}");
    }
}
