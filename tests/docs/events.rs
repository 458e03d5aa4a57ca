//! Completion events and result files, as the program really writes them.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use apbd::generate::StopReason;
use apbd::job::retry::{RetryPolicy, Verdict};
use apbd::job::{
    Digest, DocumentFacts, ErrorCode, JobError, JobResult, MessageLimits, ResultFlags, StageTimes, TokenCount, WorkerId,
};
use apbd::outbox::results::ResultWriter;
use apbd::pipeline::shutdown;
use apbd::plan::{AttentionMode, Execution, PrefillPlan, Selector};
use apbd::store::{Access, AttemptReport, ClaimRequest, Door, Ending, JobState, NewJob, Reply, Store, StoreUrl, open};
use apbd::telemetry::health::Health;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::messages::{PAGE, full, keys};
use crate::text::{Table, quoted};

/// A store in a folder that goes with it.
pub async fn fresh() -> (Arc<dyn Store>, TempDir) {
    let folder = TempDir::new().expect("a folder");
    let url = StoreUrl::Sqlite(folder.path().join("test.db"));
    (open(&url, Access::Worker, RetryPolicy::default()).await.expect("opens"), folder)
}

/// Nothing that may be absent is.
fn success() -> AttemptReport {
    let plan = PrefillPlan {
        mode: AttentionMode::Full,
        context: 100,
        query: 10,
        hosts: Vec::new(),
        anchor: None,
        selector: Selector::None,
        exact: true,
        execution: Execution::default(),
        notes: Vec::new(),
    };
    let result = JobResult {
        text: "done".to_owned(),
        extraction: Some(json!({ "owner": "Ada" })),
        tokens_in: TokenCount(110),
        tokens_out: TokenCount(5),
        stop: StopReason::EndOfText,
        model: "tiny".to_owned(),
        model_digest: "abc".to_owned(),
        device: "cpu".to_owned(),
        plan,
        flags: ResultFlags::default(),
    };
    let facts = DocumentFacts {
        bytes: Some(7),
        digest: Some(Digest::of_bytes(b"content")),
        version_id: Some("1".to_owned()),
        etag: Some("e".to_owned()),
        media_type: Some("text/plain".to_owned()),
        encoding: Some("UTF-8".to_owned()),
        tokens: Some(TokenCount(100)),
    };
    let ending = Ending::Succeeded(Box::new(result));
    AttemptReport { ending, stages: StageTimes::default(), documents: vec![facts] }
}

fn failure() -> AttemptReport {
    let error = JobError::new(ErrorCode::DocumentEmpty, "no text in it");
    let ending = Ending::Errored { error, verdict: Verdict::Fail };
    AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() }
}

/// A job with every key there is, ended with each report: the event and the result file of it.
async fn written(report: AttemptReport) -> (Value, Value) {
    let (store, folder) = fresh().await;
    let writer = ResultWriter {
        to: format!("file://{}/out", folder.path().display()).parse().expect("a URI"),
        stores: Vec::new(),
        store: store.clone(),
        poll: Duration::from_secs(60),
        health: Health::default().component("results"),
    };
    store.export_want(&writer.to.to_string()).await.expect("wanted");
    let job = full().check(None, &MessageLimits::default()).expect("a job");
    let reply = Some(Reply { target: "done-1".to_owned(), correlation_id: None });
    let id = job.id;
    let new = NewJob { job, door: Door::Amqp, origin: "jobs".to_owned(), size_bytes: None, reply };
    store.enqueue(&[new]).await.expect("enqueued");
    let request = ClaimRequest {
        worker: WorkerId::unique("test", 1),
        limit: 1,
        lease: Duration::from_secs(60),
        models: Vec::new(),
        max_bytes: None,
        only: None,
    };
    let claims = store.claim(&request).await.expect("claimed");
    assert!(store.finish(&claims[0].lease(), &report).await.expect("finished"));
    let event = store.outbox_take(1, Duration::from_secs(60)).await.expect("taken").remove(0);
    writer.run(std::future::ready(()), shutdown::channel().1).await;
    let file = fs::read(folder.path().join(format!("out/{id}.json"))).expect("a result file");
    (event.body, serde_json::from_slice(&file).expect("JSON"))
}

#[tokio::test]
async fn events_have_the_keys_of_the_table() {
    // The table of events is the one whose rows say of which they are.
    let table = events_table();
    let of = |kinds: &[&str]| -> BTreeSet<String> {
        let names = table.names();
        names.into_iter().filter(|name| kinds.contains(&table.cell(name, "of"))).collect()
    };
    let (success, failure) = (written(success()).await.0, written(failure()).await.0);
    assert_eq!(keys(&success, &["extraction"]), of(&["every event", "a success"]));
    assert_eq!(keys(&failure, &[]), of(&["every event", "no success"]));
    assert_eq!((&success["state"], &failure["state"]), (&json!("succeeded"), &json!("failed")));
}

#[tokio::test]
async fn result_files_have_the_keys_of_the_table() {
    let closed = ["result.plan", "result.extraction", "labels"];
    let (success, failure) = (written(success()).await.1, written(failure()).await.1);
    let together = &keys(&success, &closed) | &keys(&failure, &closed);
    assert_eq!(table_with("result").names(), together);
    assert_eq!((&success["error"], &failure["result"]), (&Value::Null, &Value::Null));
}

#[test]
fn final_states_are_told() {
    let names: Vec<&str> = JobState::ALL.into_iter().filter(|state| state.is_final()).map(JobState::as_str).collect();
    assert_eq!(quoted(events_table().cell("state", "what it is")), names);
    let reasons = [StopReason::EndOfText, StopReason::StopString, StopReason::GrammarComplete, StopReason::Length];
    let names: Vec<String> = reasons.iter().map(|stop| json!(stop).as_str().expect("a name").to_owned()).collect();
    assert_eq!(quoted(table_with("result").cell("result.stop", "what it is")), names);
}

fn events_table() -> Table {
    table_with("event_id")
}

/// The table that begins with `version` and has this row.
fn table_with(row: &str) -> Table {
    let all = Table::all(PAGE, "key");
    all.into_iter().find(|table| table.names().contains(row)).unwrap_or_else(|| panic!("no table has {row}"))
}
