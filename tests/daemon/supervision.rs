//! Engines that die, hang or break: each costs its own job only.

use std::process::Command;
use std::time::{Duration, Instant};

use apbd::job::{ErrorCode, JobId};
use apbd::store::{JobState, StoreUrl};
use serde_json::{Value, json};

use crate::harness::{Daemon, SOON, Site, apbd, ended, settled, succeeded, until};
use crate::services::postgres::shared;

/// Half a second until it is asked what was cancelled, a tenth until the engine is told, a tenth until its next step; and a busy machine.
const CANCELLED_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_kills_the_engine_is_quarantined_and_its_neighbours_succeed() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut neighbours = Vec::new();
    let mut poison = None;
    for number in 0..50 {
        match number {
            7 => poison = Some(site.send(&publisher, 1).await),
            _ => neighbours.push(site.send(&publisher, 0).await),
        }
    }
    settled(&*store, 50).await;
    for job in neighbours {
        assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
    }
    let detail = ended(&*store, poison.expect("sent")).await;
    assert_eq!((detail.summary.state, detail.attempts.len()), (JobState::Dead, 2));
    assert_eq!(detail.summary.error.expect("a reason").code, ErrorCode::EngineCrashed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hang_and_a_broken_device_cost_their_own_job_only() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    for (seed, code) in [(2, ErrorCode::EngineHung), (3, ErrorCode::DeviceFailed)] {
        let bad = site.send(&publisher, seed).await;
        until("its first attempt has ended", || async {
            store.show(bad).await.expect("shown").is_some_and(|detail| detail.failures.suspect >= 1)
        })
        .await;
        let next = site.send(&publisher, 0).await;
        assert_eq!(succeeded(&*store, next).await.attempts.len(), 1, "the next job succeeds at its first attempt");
        let detail = store.show(bad).await.expect("shown").expect("there");
        assert_eq!(detail.summary.error.expect("a reason").code, code);
        store.cancel(bad).await.expect("cancelled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_cancelled_long_before_its_next_heartbeat() {
    let mut site = Site::on_postgres(shared()).await;
    // A beat every 40 s.
    site.lease_s = 120;
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(600), None).await;
    until("it runs", || async {
        store.show(job).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    let StoreUrl::Postgres(url) = &site.database else { panic!("not on PostgreSQL") };
    let said = apbd(&["cancel", "--db", url, "--format", "json", &job.to_string()], &site.path("documents/plain.txt"));
    let at = Instant::now();
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON");
    assert_eq!(said, json!([{ "job_id": job, "outcome": "requested", "state": null }]));
    assert_eq!(ended(&*store, job).await.summary.state, JobState::Cancelled);
    assert!(at.elapsed() < CANCELLED_WITHIN, "{:?}", at.elapsed());
    let next = site.send(&publisher, 0).await;
    succeeded(&*store, next).await;
    assert!(!daemon.log().contains("the engine is replaced"), "it stopped by itself");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stands_still_is_killed_within_its_budget_and_the_next_one_serves() {
    let mut site = Site::new();
    // A layer of so short a document is read in less than the budget, also by a machine that compiles at the same time.
    site.engine = "ranks = 2\nthreads = 2\nsilence_floor_s = 5\nsilence_factor = 1.0\n".to_owned();
    let uri = site.document("long.txt", &"The harbour of the town opens at nine. ".repeat(600));
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    // So many fields that it is still being answered when its progress is told, once a second, also by a fast machine.
    let fields: serde_json::Map<String, Value> =
        (0..100).map(|field| (format!("field_{field}"), json!({ "type": "string" }))).collect();
    let schema = json!({ "type": "object", "required": fields.keys().collect::<Vec<_>>(), "properties": fields });
    let body = json!({ "version": 1, "task": "extract", "documents": [{ "uri": uri }], "schema": schema, "max_new_tokens": 2000 });
    site.send_raw(&publisher, job, &body, None).await;
    until("it is in the engine", || async {
        let detail = store.show(job).await.expect("shown");
        detail.is_some_and(|detail| detail.summary.progress.is_some_and(|progress| progress.done > 0))
    })
    .await;
    let stopped = engine_process(&daemon).expect("an engine");
    signal(stopped, "STOP");
    let (at, next) = (Instant::now(), site.send(&publisher, 0).await);
    assert_eq!(succeeded(&*store, next).await.attempts.len(), 1, "the next job succeeds at its first attempt");
    // Five seconds of silence, a start of the engine, a short document; and a busy machine.
    assert!(at.elapsed() < SOON, "{:?}", at.elapsed());
    let first = store.show(job).await.expect("shown").expect("there").attempts[0].clone();
    assert_eq!(first.error.expect("a reason").code, ErrorCode::EngineHung);
    assert_ne!(engine_process(&daemon), Some(stopped));
    assert!(!std::path::Path::new(&format!("/proc/{stopped}")).exists(), "SIGKILL is the last word");
    store.cancel(job).await.expect("cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_keep_dying_stop_the_claims_and_the_readiness_until_one_lives() {
    let mut site = Site::new();
    site.variables.insert("APBD_WORK_MAX_ATTEMPTS".to_owned(), "1".to_owned());
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut fatal = Vec::new();
    for _ in 0..5 {
        fatal.push(site.send(&publisher, 1).await);
    }
    let harmless = site.send(&publisher, 0).await;
    until("the last of them has killed its engine", || async {
        let log = daemon.log();
        log.contains("\"engine.given_up\":true")
    })
    .await;
    let (status, text) = daemon.get("/readyz").expect("an answer");
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("engine: "), "{text}");
    let waits = store.show(harmless).await.expect("shown").expect("there");
    assert!(waits.summary.state == JobState::Queued || waits.attempts.len() == 1, "{:?}", waits.summary);
    // It is tried again when the breaker allows it, with no job to ask for it.
    daemon.ready().await;
    let detail = succeeded(&*store, harmless).await;
    assert_eq!(detail.failures.suspect, 0, "what found no engine is not to blame");
    for job in fatal {
        assert_eq!(ended(&*store, job).await.summary.state, JobState::Dead);
    }
}

/// The process of the daemon's engine.
fn engine_process(daemon: &Daemon) -> Option<u32> {
    daemon.engines().into_iter().next()
}

fn signal(process: u32, name: &str) {
    let status = Command::new("sh").args(["-c", "kill -$0 $1", name, &process.to_string()]).status();
    assert!(status.expect("kill runs").success());
}
