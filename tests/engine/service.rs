//! The engine as the pipeline uses it: the fixture model, admission, text, cancelling.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use apbd::engine::{Engine, EngineError, HEADS_FILE, InferRequest, Job, LocalEngine, LocalOptions, Progress};
use apbd::generate::{GenerationOptions, StopReason};
use apbd::model::tokenizer::Tokenizer;
use apbd::plan::{AttentionMode, AttentionRequest, Execution, PassingType, Selector};
use serde_json::json;

use super::runs::Forced;
use super::strategies::relative_error;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

fn open(options: LocalOptions) -> LocalEngine {
    LocalEngine::open(&fixture(), &options).unwrap()
}

fn request(document: &str, max_new_tokens: usize) -> InferRequest {
    let tokenizer = Tokenizer::load(&fixture()).unwrap();
    let tokens = |text: &str| tokenizer.encode_plain(text).unwrap();
    InferRequest {
        context: tokens(document),
        query: tokens("\n\nSummarise the document above as an outline."),
        query_at: 0,
        attention: AttentionRequest::default(),
        generation: GenerationOptions { max_new_tokens, ..GenerationOptions::default() },
    }
}

#[test]
fn says_what_it_is() {
    let info = open(LocalOptions::default()).info();
    assert_eq!((info.model.as_str(), info.max_tokens, info.device.as_str()), ("model", 65536, "cpu"));
    assert_eq!(info.has_retaining_heads, fixture().join(HEADS_FILE).is_file());
    assert_eq!(info.model_digest.len(), 64);
}

#[test]
fn generates_text_and_reports_every_layer_and_token() {
    let engine = open(LocalOptions { ranks: 2, threads: 2, ..LocalOptions::default() });
    let reports = Mutex::new(Vec::new());
    let observer = |progress: Progress| {
        reports.lock().unwrap().push(progress);
        true
    };
    let mut asked = request("The harbour opens at nine. The archive is closed on Mondays.", 6);
    asked.attention =
        AttentionRequest { mode: Some(AttentionMode::Apb), hosts: Some(2), ..AttentionRequest::default() };
    let outcome = engine.infer(&asked, &observer).unwrap();
    let text = Tokenizer::load(&fixture()).unwrap().decode(&outcome.tokens).unwrap();
    assert_eq!(outcome.text, text);
    assert!(outcome.tokens.len() == 6 && outcome.stop == StopReason::Length || outcome.stop == StopReason::EndOfText);
    assert_eq!(outcome.plan.hosts.len(), 2);
    let reports = reports.into_inner().unwrap();
    assert_eq!(reports[..9], std::array::from_fn::<_, 9, _>(|done| Progress::Prefill { layers_done: done, layers: 8 }));
    assert_eq!(reports[9], Progress::Generate { tokens: 1, at_most: 6 });
}

/// The prompt of a question about a document, as the fixture model was trained on it.
fn question(document: &str, question: &str, attention: AttentionRequest) -> InferRequest {
    let tokenizer = Tokenizer::load(&fixture()).unwrap();
    let head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n";
    let ask = format!("\n\nAnswer from the document above: {question}");
    let tail = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
    let mut context = tokenizer.encode_template(head).unwrap();
    let query_at = context.len();
    context.extend(tokenizer.encode_plain(document).unwrap());
    let query = [tokenizer.encode_plain(&ask).unwrap(), tokenizer.encode_template(tail).unwrap()].concat();
    InferRequest { query_at, attention, context, query, generation: GenerationOptions::default() }
}

/// The lines around the first place where `answer` stands: without optimisation a whole document takes a minute.
fn part_around(document: &str, answer: &str) -> String {
    let lines: Vec<&str> = document.lines().collect();
    let at = lines.iter().position(|line| line.contains(answer)).unwrap();
    lines[at.saturating_sub(40)..lines.len().min(at + 40)].join("\n")
}

/// A document, and questions about it with their answers.
fn asked_of_ownership() -> (String, Vec<serde_json::Value>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/documents");
    let document = std::fs::read_to_string(folder.join("ownership.md")).unwrap();
    let questions = std::fs::read_to_string(folder.join("questions.jsonl")).unwrap();
    let questions = questions.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    (document, questions.filter(|asked| asked["document"] == "ownership.md" && asked["kind"] == "record").collect())
}

/// In parts of about a thousand tokens the logits moved by 0.15 to 0.41 % of the largest; APB itself moves them by 3 to 34 %.
#[test]
fn passing_blocks_in_fp8_cost_the_fixture_model_little() {
    let (document, questions) = asked_of_ownership();
    let engine = open(LocalOptions { ranks: 2, ..LocalOptions::default() });
    for asked in questions.iter().take(3) {
        let answer = asked["answer"].as_str().unwrap();
        let part = part_around(&document, answer);
        let of = |mode, passing_type| {
            let execution = Execution { passing_type, ..Execution::default() };
            let attention = AttentionRequest { mode: Some(mode), execution, ..AttentionRequest::default() };
            let request = question(&part, asked["question"].as_str().unwrap(), attention);
            let (context, query) = (&request.context, &request.query);
            let plan = engine.plan(context.len(), query.len(), request.query_at, &request.attention).unwrap();
            let mut driver = Forced::new(&[]);
            engine.run(&Job { context, query, plan: &plan, new_tokens: 1 }, &mut driver).unwrap();
            (driver.logits.remove(0), engine.infer(&request, &|_| true).unwrap())
        };
        let (native, _) = of(AttentionMode::Apb, PassingType::Native);
        let (fp8, outcome) = of(AttentionMode::Apb, PassingType::Fp8);
        let (full, _) = of(AttentionMode::Full, PassingType::Native);
        let reference: Vec<f64> = native.iter().map(|logit| f64::from(*logit)).collect();
        let (cost, of_apb) = (relative_error(&fp8, &reference), relative_error(&full, &reference));
        println!("{} tokens: FP8 {cost:.4}, APB against full {of_apb:.4}", outcome.plan.context);
        assert!(cost > 0.0 && cost < 0.02, "{}: {cost}", asked["question"]);
        assert_eq!(outcome.text, answer, "{}", asked["question"]);
        assert!(outcome.plan.notes.iter().any(|note| note.contains("FP8")), "{:?}", outcome.plan.notes);
    }
}

#[test]
fn a_real_document_is_answered_right_by_full_and_by_apb() {
    let (document, questions) = asked_of_ownership();
    let engine = open(LocalOptions { ranks: 2, ..LocalOptions::default() });
    for asked in questions.iter().take(1) {
        let answer = asked["answer"].as_str().unwrap();
        for mode in [AttentionMode::Full, AttentionMode::Apb] {
            let attention = AttentionRequest { mode: Some(mode), ..AttentionRequest::default() };
            let request = question(&part_around(&document, answer), asked["question"].as_str().unwrap(), attention);
            let outcome = engine.infer(&request, &|_| true).unwrap();
            assert_eq!(outcome.text, answer, "{mode:?}: {}", asked["question"]);
            assert_eq!(outcome.stop, StopReason::EndOfText);
        }
    }
}

#[test]
fn a_schema_is_followed_to_its_end() {
    let engine = open(LocalOptions::default());
    let mut asked = request("# Minutes\nThe reference number is 152/1540. The owner is Kate Waethy.", 60);
    let text = json!({ "type": "string", "maxLength": 12 });
    asked.generation.schema = Some(json!({
        "type": "object", "properties": { "owner": text, "number": text },
        "required": ["owner", "number"], "additionalProperties": false,
    }));
    let outcome = engine.infer(&asked, &|_| true).unwrap();
    assert!(matches!(outcome.stop, StopReason::GrammarComplete | StopReason::EndOfText), "{outcome:?}");
    let value: serde_json::Value = serde_json::from_str(&outcome.text).unwrap();
    assert_eq!(value.as_object().unwrap().keys().collect::<Vec<_>>(), ["owner", "number"]);
    asked.generation.schema = Some(json!({ "type": "no such type" }));
    let error = engine.infer(&asked, &|_| true).unwrap_err();
    assert!(matches!(&error, EngineError::Schema { reason } if reason.contains("schema")), "{error}");
}

#[test]
fn a_seed_repeats_and_a_stop_string_ends() {
    let engine = open(LocalOptions::default());
    let mut asked = request("The harbour opens at nine. The archive is closed on Mondays.", 20);
    asked.generation.temperature = 1.5;
    asked.generation.seed = 11;
    let first = engine.infer(&asked, &|_| true).unwrap();
    assert_eq!(engine.infer(&asked, &|_| true).unwrap().tokens, first.tokens);
    let middle: String = first.text.chars().skip(2).take(3).collect();
    asked.generation.stop = vec![middle.clone()];
    let stopped = engine.infer(&asked, &|_| true).unwrap();
    assert_eq!(stopped.stop, StopReason::StopString);
    assert_eq!(stopped.text, first.text[..first.text.find(&middle).unwrap()]);
    asked.generation.top_p = 0.0;
    assert!(matches!(engine.infer(&asked, &|_| true), Err(EngineError::Input { .. })));
}

#[test]
fn a_cancelled_inference_says_so_and_the_engine_serves_the_next() {
    let engine = open(LocalOptions { ranks: 2, threads: 2, ..LocalOptions::default() });
    let asked = request("One. Two. Three.", 2);
    let cancel = |progress| !matches!(progress, Progress::Prefill { layers_done: 3, .. });
    assert_eq!(engine.infer(&asked, &cancel).unwrap_err(), EngineError::Cancelled);
    assert!(engine.infer(&asked, &|_| true).is_ok());
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_computed() {
    let engine = open(LocalOptions { memory_bytes: Some(1 << 20), ..LocalOptions::default() });
    let error = engine.infer(&request(&"words ".repeat(5000), 2), &|_| panic!("nothing to report")).unwrap_err();
    assert!(matches!(error, EngineError::Memory { available_bytes: 1_048_576, .. }), "{error}");
    let long = InferRequest { context: vec![5; 70_000], ..request("", 2) };
    let error = engine.infer(&long, &|_| panic!("nothing to report")).unwrap_err();
    assert!(matches!(&error, EngineError::Input { reason } if reason.contains("65536 positions")), "{error}");
}

#[test]
fn plans_by_length_and_with_its_own_heads() {
    let engine = open(LocalOptions { memory_bytes: Some(64 << 30), ..LocalOptions::default() });
    let plan = |context| engine.plan(context, 40, 16, &AttentionRequest::default()).unwrap();
    assert_eq!((plan(4000).mode, plan(4000).exact), (AttentionMode::Full, true));
    let long = plan(32_768);
    assert_eq!((long.mode, long.hosts.len(), long.exact), (AttentionMode::Apb, 8, false));
    let selector = if fixture().join(HEADS_FILE).is_file() { Selector::RetainingHead } else { Selector::QueryAware };
    assert_eq!(long.selector, selector);
}
