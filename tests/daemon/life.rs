//! Start, stop, and what an operator sees.

use std::fs;
use std::time::Duration;

use apbd::job::JobId;
use apbd::store::JobState;

use crate::harness::{SOON, Site, apbd, succeeded, until};

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
