//! Start, stop, and what an operator sees.

use std::fs;
use std::time::{Duration, Instant};

use apbd::job::{JobId, Stage};
use apbd::store::{JobState, Store};
use serde_json::json;

use crate::harness::{Daemon, SOON, Site, apbd, succeeded, until};
use crate::services::postgres::Postgres;
use crate::services::rabbitmq::RabbitMq;

/// A grace of 2 s, what is to be written and said goodbye to; and a busy machine.
const STOPPED_WITHIN: Duration = Duration::from_secs(12);

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_hands_back_what_is_unfinished_without_spending_an_attempt() {
    let site = Site::new();
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = site.send(&publisher, 4).await;
    until("it runs", || async {
        store.show(job).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    daemon.signal("TERM");
    // A grace of 2 s, and an engine that would go on for 3 s.
    assert_eq!(daemon.ended(SOON), Some(0));
    let detail = store.show(job).await.expect("shown").expect("there");
    assert_eq!(detail.summary.state, JobState::Queued, "{:?}", detail.summary);
    assert_eq!((detail.failures.suspect, detail.failures.infra), (0, 0));
    let _second = site.start();
    succeeded(&*store, job).await;
}

/// Tells the daemon to stop; it does within its grace of 2 s, and whatever it held waits again with its attempts unspent.
async fn hands_back(daemon: &mut Daemon, store: &dyn Store, jobs: &[JobId]) {
    let at = Instant::now();
    daemon.signal("TERM");
    assert_eq!(daemon.ended(SOON), Some(0));
    assert!(at.elapsed() < STOPPED_WITHIN, "{:?}", at.elapsed());
    for job in jobs {
        let detail = store.show(*job).await.expect("shown").expect("there");
        assert_eq!(detail.summary.state, JobState::Queued, "{:?}", detail.summary);
        assert_eq!((detail.failures.suspect, detail.failures.infra), (0, 0));
    }
}

async fn is_in(store: &dyn Store, job: JobId, stage: Stage) {
    until("it is in its stage", || async {
        let detail = store.show(job).await.expect("shown");
        detail.is_some_and(|detail| detail.summary.progress.is_some_and(|progress| progress.stage == stage))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_in_a_prefill_hands_back_what_is_read_and_what_waits_for_the_engine() {
    let site = Site::new();
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut body = site.lasting(600);
    body["seed"] = json!(8);
    let [reads, waits] = [JobId::random(), JobId::random()];
    site.send_raw(&publisher, reads, &body, None).await;
    is_in(&*store, reads, Stage::Prefill).await;
    site.send_raw(&publisher, waits, &body, None).await;
    until("the second is prepared", || async {
        store.show(waits).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    hands_back(&mut daemon, &*store, &[reads, waits]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_does_not_wait_for_a_document_that_takes_long_to_decode() {
    let site = Site::new();
    let uri =
        site.document("long.txt", &"The harbour of the town opens at nine, as it did before.\n".repeat(2_000_000));
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    let body = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }] });
    site.send_raw(&publisher, job, &body, None).await;
    is_in(&*store, job, Stage::Decode).await;
    hands_back(&mut daemon, &*store, &[job]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_before_its_services_waits_for_them_and_says_so() {
    let (mut server, mut broker) = (Postgres::start(), RabbitMq::start(""));
    let mut site = Site::on_postgres(&server).await;
    site.broker_url = broker.url();
    server.stop();
    broker.kill();
    let daemon = site.start();
    until("it says what it waits for", || async { daemon.log().contains("waiting for the database") }).await;
    assert_eq!(daemon.get("/healthz").expect("an answer").0, 200);
    assert_eq!(daemon.get("/readyz").expect("an answer").0, 503);
    server.restart();
    until("it says that the broker is missing", || async {
        daemon.get("/readyz").is_some_and(|(status, text)| status == 503 && text.contains("intake: amqp://127.0.0.1"))
    })
    .await;
    broker.restart();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = site.send(&publisher, 0).await;
    succeeded(&*store, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probes_and_metrics_tell_the_truth() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = site.send(&publisher, 0).await;
    succeeded(&*store, job).await;
    assert_eq!(daemon.get("/healthz").expect("an answer").0, 200);
    until("the metrics count it", || async {
        let (_, text) = daemon.get("/metrics").expect("an answer");
        text.contains("apbd_attempts_total{state=\"succeeded\",code=\"none\"} 1")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_configuration_are_all_said_before_anything_is_connected() {
    let site = Site::new();
    let path = site.path("bad.toml");
    fs::write(&path, "[amqp]\nurl = \"x\"\nunknown = 1\n[work]\nlease_s = 1\n").expect("written");
    for command in ["serve", "check"] {
        let output = apbd(&[command, "--config", &path.display().to_string()], &path);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{said}");
        for named in ["[amqp]", "[database] url", "lease_s"] {
            assert!(said.contains(named), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_answers_and_submit_brings_a_job() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let config = site.configuration(1).display().to_string();
    let output = apbd(&["check", "--config", &config], &site.path("documents/plain.txt"));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(all_is_wrong_at_once(&site));
    let job = site.path("job.json");
    let uri = format!("file://{}", site.path("documents/plain.txt").display());
    fs::write(&job, format!("{{\"version\":1,\"task\":\"summarise\",\"documents\":[{{\"uri\":\"{uri}\"}}]}}"))
        .expect("written");
    let submit = |queue: &str| apbd(&["submit", "-", "--amqp", &site.broker_url, "--queue", queue], &job);
    let output = submit(&site.queue);
    let id = String::from_utf8_lossy(&output.stdout).trim().parse().expect("an id");
    succeeded(&*site.store().await, id).await;
    let nowhere = submit("no-such-queue");
    assert_eq!(nowhere.status.code(), Some(64), "a returned message is no success");
}

/// `apbd check` of a configuration that is valid, and of which nothing is there: one answer for each thing.
fn all_is_wrong_at_once(site: &Site) -> bool {
    let folder = site.directory.path().display();
    let text = format!(
        "[database]\nurl = \"postgres://nobody@127.0.0.1:1/jobs\"\n[amqp]\nurl = \"amqp://127.0.0.1:1\"\n\
         [files]\nfolders = [\"{folder}/gone\"]\n[results]\nat = \"file://{folder}/documents/plain.txt\"\n\
         [[store]]\nalias = \"main\"\nendpoint = \"http://127.0.0.1:1\"\nallow_http = true\nanonymous = true\nallowed = [\"b\"]\n\
         silence_s = 1\n[[drop]]\nat = \"s3://main/b/in/\"\nevents_queue = \"events\"\n[[drop]]\nat = \"file://{folder}/gone\"\n"
    );
    let path = site.path("wrong.toml");
    fs::write(&path, text).expect("written");
    let output = apbd(&["check", "--format", "json", "--config", &path.display().to_string()], &path);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(69), "{said}");
    let lines: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let failed = lines.as_array().expect("a list").iter().filter(|line| line["ok"] == json!(false));
    let failed: Vec<&str> = failed.map(|line| line["what"].as_str().expect("a text")).collect();
    let expected = ["database", "broker", "store", "folder", "queue of events", "drop folder", "results"];
    failed.len() == expected.len() && failed.iter().zip(expected).all(|(what, begins)| what.starts_with(begins))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_file_is_one_job_a_version() {
    let mut site = Site::new();
    let drop = site.path("documents/drop");
    fs::create_dir_all(drop.join("sub folder")).expect("made");
    site.extra = format!("[[drop]]\nat = \"file://{}\"\nsettle_s = 0\npoll_s = 1\n", drop.display());
    fs::write(drop.join("sub folder/ü 1.txt"), "First words.").expect("written");
    fs::write(drop.join("two.txt"), "Second words.").expect("written");
    let mut daemon = site.start();
    let store = site.store().await;
    crate::harness::settled(&*store, 2).await;
    daemon.kill();
    fs::write(drop.join("two.txt"), "Other words.").expect("written");
    let _again = site.start();
    let jobs = crate::harness::settled(&*store, 3).await;
    assert!(jobs.iter().all(|job| job.state == JobState::Succeeded));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(crate::harness::all(&*store).await.len(), 3, "nothing is taken twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_in_python_gets_its_completion_event() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let job = site.path("job.json");
    let uri = format!("file://{}", site.path("documents/plain.txt").display());
    fs::write(&job, format!("{{\"version\":1,\"task\":\"summarise\",\"documents\":[{{\"uri\":\"{uri}\"}}]}}"))
        .expect("written");
    let producer = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/jobs/producer.py");
    let python = crate::services::python("python");
    let output = std::process::Command::new(python).args([producer, &site.broker_url, &site.queue]).arg(&job).output();
    let output = output.expect("run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let event: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(event["state"], "succeeded");
}

#[test]
fn the_examples_are_valid() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = root.join("deploy/apbd.toml").display().to_string();
    let output = apbd(&["check", "--offline", "--config", &config], &root.join("deploy/apbd.toml"));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let limits = apbd::job::MessageLimits::default();
    for name in ["ask.json", "extract.json"] {
        let text = fs::read(root.join("fixtures/jobs").join(name)).expect("read");
        let message = apbd::job::JobMessage::parse(&text, &limits).expect(name);
        message.check(Some(apbd::job::JobId::random()), &limits).expect(name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_starts_again_with_the_configuration_as_it_is_then() {
    let mut site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let path = site.path(&format!("apbd-{}.toml", daemon.port));
    let good = fs::read_to_string(&path).expect("a configuration");

    fs::write(&path, good.replace("lease_s = 3", "lease_s = 1")).expect("written");
    daemon.signal("HUP");
    until("the fault is said", || async { daemon.log().contains("lease_s: at least 3") }).await;
    succeeded(&*store, site.send(&publisher, 0).await).await;

    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(8), None).await;
    until("it runs", || async {
        store.show(job).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    let first = site.queue.clone();
    site.queue = format!("{first}-new");
    drop(site.publisher().await);
    fs::write(&path, good.replace(&first, &site.queue)).expect("written");
    daemon.signal("HUP");
    // The same process, which is the child that the harness started, with another queue.
    let second = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, second).await.attempts.len(), 1);
    assert_eq!(succeeded(&*store, job).await.attempts.len(), 1, "what ran ended within the grace");
    daemon.ready().await;
}
