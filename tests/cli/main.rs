//! What the subcommands that look at a database print, and how they exit.

#[cfg(feature = "cuda")]
mod devices;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use apbd::job::retry::{RetryPolicy, Verdict};
use apbd::job::wire::DocumentMessage;
use apbd::job::{ErrorCode, JobError, JobId, JobMessage, MessageLimits, StageTimes, Task, WorkerId};
use apbd::store::{Access, AttemptReport, ClaimRequest, Door, Ending, NewJob, StoreUrl, open};
use serde_json::Value;
use tempfile::TempDir;

/// A database with a failed job and a waiting one.
struct Fixture {
    _directory: TempDir,
    path: PathBuf,
    failed: JobId,
    waiting: JobId,
}

async fn fixture() -> Fixture {
    let directory = TempDir::new().expect("a temporary directory");
    let path = directory.path().join("jobs.db");
    let store = open(&StoreUrl::Sqlite(path.clone()), Access::Worker, RetryPolicy::local()).await.expect("opens");
    let mut ids = Vec::new();
    for name in ["first", "second"] {
        let document = DocumentMessage { uri: format!("file:///{name}.txt"), ..DocumentMessage::default() };
        let message = JobMessage::new(Task::Summarise, vec![document]);
        let job = message.check(Some(JobId::random()), &MessageLimits::default()).expect("valid");
        ids.push(job.id);
        let new = NewJob { job, door: Door::Files, origin: "test".to_owned(), size_bytes: None, reply: None };
        store.enqueue(&[new]).await.expect("enqueued");
    }
    let claim = store.claim(&request(ids[0])).await.expect("claimed").remove(0);
    let error = JobError::new(ErrorCode::DocumentNotFound, "file:///first.txt: there is no such document");
    let ending = Ending::Errored { error, verdict: Verdict::Fail };
    let report = AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() };
    store.finish(&claim.lease(), &report).await.expect("finished");
    store.close().await;
    Fixture { _directory: directory, path, failed: ids[0], waiting: ids[1] }
}

fn request(job: JobId) -> ClaimRequest {
    ClaimRequest {
        worker: WorkerId::unique("test", 1),
        limit: 1,
        lease: std::time::Duration::from_secs(60),
        models: Vec::new(),
        max_bytes: None,
        only: Some(vec![job]),
    }
}

fn apbd(database: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
    command.args(&arguments[..1]).arg("--db").arg(database).args(&arguments[1..]);
    command.env_remove("APBD_DATABASE_URL").output().expect("runs")
}

#[track_caller]
fn stdout(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[tokio::test]
async fn jobs_lists_them_and_filters_by_state() {
    let fixture = fixture().await;
    let all = stdout(&apbd(&fixture.path, &["jobs"]), 0);
    assert!(all.contains(&fixture.failed.to_string()) && all.contains(&fixture.waiting.to_string()), "{all}");
    let failed = stdout(&apbd(&fixture.path, &["jobs", "--state", "failed", "--format", "json"]), 0);
    let failed: Value = serde_json::from_str(&failed).expect("JSON");
    assert_eq!(failed.as_array().map(Vec::len), Some(1));
    assert_eq!(failed[0]["error"]["code"], "document_not_found");
}

#[tokio::test]
async fn show_tells_why_a_job_failed() {
    let fixture = fixture().await;
    let shown = stdout(&apbd(&fixture.path, &["show", &fixture.failed.to_string()]), 0);
    assert!(shown.contains("document_not_found (input)") && shown.contains("there is no such document"), "{shown}");
    let unknown = apbd(&fixture.path, &["show", &JobId::random().to_string()]);
    assert_eq!(unknown.status.code(), Some(64));
}

#[tokio::test]
async fn cancel_and_replay_say_what_came_of_it() {
    let fixture = fixture().await;
    let waiting = fixture.waiting.to_string();
    assert_eq!(stdout(&apbd(&fixture.path, &["cancel", &waiting]), 0), format!("{waiting}: cancelled\n"));
    assert!(stdout(&apbd(&fixture.path, &["cancel", &waiting]), 0).contains("had ended: cancelled"));
    assert!(stdout(&apbd(&fixture.path, &["cancel", &JobId::random().to_string()]), 1).contains("no such job"));
    assert_eq!(stdout(&apbd(&fixture.path, &["replay", "--failed"]), 0), "1 queued again\n");
    assert_eq!(stdout(&apbd(&fixture.path, &["replay", &waiting]), 0), "1 queued again\n");
    assert_eq!(stdout(&apbd(&fixture.path, &["replay", &waiting]), 1), "0 queued again\n", "it waits already");
}

#[tokio::test]
async fn programs_are_told_in_json_what_came_of_it() {
    let fixture = fixture().await;
    let (waiting, nobody) = (fixture.waiting.to_string(), JobId::random().to_string());
    let json = |arguments: &[&str], code| -> Value {
        let said = stdout(&apbd(&fixture.path, &[arguments, &["--format", "json"]].concat()), code);
        serde_json::from_str(&said).expect("JSON")
    };
    let cancelled = json(&["cancel", &waiting, &nobody], 1);
    assert_eq!(cancelled[0], serde_json::json!({ "job_id": waiting, "outcome": "cancelled", "state": null }));
    assert_eq!(cancelled[1]["outcome"], "not_found");
    let again = json(&["cancel", &waiting], 0);
    assert_eq!((&again[0]["outcome"], &again[0]["state"]), (&"had_ended".into(), &"cancelled".into()));
    assert_eq!(json(&["replay", "--failed"], 0), serde_json::json!({ "queued_again": 1 }));
    assert_eq!(json(&["replay", "--dead"], 0), serde_json::json!({ "queued_again": 0 }));
    assert_eq!(json(&["show", &waiting], 0)["job_id"], waiting.as_str());
    assert!(json(&["migrate"], 0)["database"].as_str().is_some_and(|place| place.contains("jobs.db")));
}

#[tokio::test]
async fn what_ended_is_forgotten_when_it_is_old_enough() {
    let fixture = fixture().await;
    let forget = |days: &str| stdout(&apbd(&fixture.path, &["forget", "--older-than", days]), 0);
    assert_eq!(forget("1"), "0 jobs and 0 rejected messages forgotten\n");
    assert_eq!(forget("0"), "1 jobs and 0 rejected messages forgotten\n");
    assert_eq!(apbd(&fixture.path, &["show", &fixture.failed.to_string()]).status.code(), Some(64));
    assert!(stdout(&apbd(&fixture.path, &["show", &fixture.waiting.to_string()]), 0).contains("queued"));
    let json = stdout(&apbd(&fixture.path, &["forget", "--older-than", "0", "--format", "json"]), 0);
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json, serde_json::json!({ "jobs": 0, "rejections": 0 }));
    assert_eq!(apbd(&fixture.path, &["forget"]).status.code(), Some(64), "how old is not guessed");
}

#[tokio::test]
async fn dead_jobs_are_replayed_together() {
    let fixture = fixture().await;
    kill(&fixture).await;
    assert_eq!(stdout(&apbd(&fixture.path, &["replay", "--dead"]), 0), "1 queued again\n");
    let waits = stdout(&apbd(&fixture.path, &["jobs", "--state", "queued", "--format", "json"]), 0);
    let waits: Value = serde_json::from_str(&waits).expect("JSON");
    assert_eq!((waits.as_array().map(Vec::len), &waits[0]["job_id"]), (Some(1), &fixture.waiting.to_string().into()));
}

/// Quarantines the waiting job.
async fn kill(fixture: &Fixture) {
    let url = StoreUrl::Sqlite(fixture.path.clone());
    let store = open(&url, Access::Worker, RetryPolicy::local()).await.expect("opens");
    let claim = store.claim(&request(fixture.waiting)).await.expect("claimed").remove(0);
    let error = JobError::new(ErrorCode::EngineCrashed, "signal 11");
    let ending = Ending::Errored { error, verdict: Verdict::Quarantine };
    let report = AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() };
    assert!(store.finish(&claim.lease(), &report).await.expect("finished"));
    store.close().await;
}

#[tokio::test]
async fn reports_are_tables_or_json() {
    let fixture = fixture().await;
    let all = stdout(&apbd(&fixture.path, &["report"]), 0);
    assert!(all.contains("report_backlog") && all.contains("document_not_found"), "{all}");
    let backlog = stdout(&apbd(&fixture.path, &["report", "backlog", "--format", "json"]), 0);
    let backlog: Value = serde_json::from_str(&backlog).expect("JSON");
    assert_eq!(backlog["backlog"]["rows"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_database_that_is_not_there_is_a_usage_error() {
    let output = apbd(Path::new("/nowhere/jobs.db"), &["jobs"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/jobs.db"));
}
