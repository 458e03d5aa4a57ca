//! Drop folders and result files: one job or one visible rejection a version of a file, whatever is lost, doubled or killed.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apbd::document::fetch::FileSource;
use apbd::intake::dropfolder::{Disposal, DropFolder, DropPlace, DropProfile, Profiles, Sidecars};
use apbd::job::retry::RetryPolicy;
use apbd::job::{JobId, Priority, Task};
use apbd::objects::{GetRequest, ObjectClient, ObjectError};
use apbd::pipeline::shutdown;
use apbd::store::{Access, JobState, JobSummary, ReportView, Store, open};
use apbd::telemetry::health::Health;
use serde_json::{Value, json};

use crate::harness::{SOON, Site, all, declare, settled, until};
use crate::objects::{client, patient_client};
use crate::services::postgres;
use crate::services::s3::{S3, shared};

/// A bucket of its own, and the configuration of a store that may read it.
async fn bucket(server: &S3, port: u16) -> (ObjectClient, String, String) {
    let name = format!("b-{}", JobId::random());
    let direct = client(server, server.port, &server.secret_access_key);
    direct.put(&name, "", "text/plain", Vec::new()).await.expect("a bucket");
    let text = format!(
        "[[store]]\nalias = \"main\"\nendpoint = \"http://127.0.0.1:{port}\"\naccess_key_id = \"{}\"\nsecret_access_key = \"{}\"\n\
         allow_http = true\nallowed = [\"{name}\"]\nsilence_s = 2\n",
        server.access_key_id, server.secret_access_key
    );
    (direct, name, text)
}

async fn put(client: &ObjectClient, bucket: &str, key: &str, text: &str) {
    client.put(bucket, key, "text/plain", text.as_bytes().to_vec()).await.expect("written");
}

async fn keys(client: &ObjectClient, bucket: &str, prefix: &str) -> Vec<String> {
    let page = client.list(bucket, prefix, None).await.expect("listed");
    page.objects.into_iter().map(|object| object.key).collect()
}

async fn rejections(store: &dyn Store) -> u64 {
    let table = store.report(ReportView::Failures, 100).await.expect("a report");
    let column = |name: &str| table.columns.iter().position(|column| column == name).expect("a column");
    let (kind, count) = (column("kind"), column("count"));
    table.rows.iter().filter(|row| row[kind] == "rejection").filter_map(|row| row[count].as_u64()).sum()
}

fn documents(jobs: &[JobSummary]) -> Vec<&str> {
    let mut names: Vec<_> = jobs.iter().map(|job| job.document.as_str()).collect();
    names.sort_unstable();
    names
}

/// In the order in which a look comes to them.
pub const FAILPOINTS: [&str; 10] = [
    "drop.seen",
    "drop.listed",
    "drop.rejected",
    "drop.committed",
    "drop.marked",
    "drop.disposing",
    "drop.copied",
    "drop.half_disposed",
    "drop.disposed",
    "results.written",
];

/// Odd keys, all of them documents.
const ODD: [&str; 6] = ["a//b.txt", "with space/ü漢.txt", "100%+&=?#.txt", " lead", "a\\b'\"<x>.txt", "%2e%2e%2Fc.txt"];

async fn crash_everywhere(mut site: Site) {
    let server = shared();
    let (direct, bucket, store_text) = bucket(server, server.port).await;
    // A job may be in the engine at any of the kills.
    site.variables.insert("APBD_WORK_MAX_ATTEMPTS".to_owned(), "20".to_owned());
    site.extra = format!(
        "{store_text}[results]\nat = \"s3://main/{bucket}/results/\"\n[[drop]]\nat = \"s3://main/{bucket}/drop/\"\nsettle_s = 0\npoll_s = 1\n\
         after = \"move\"\nmove_to = \"s3://main/{bucket}/done/\"\nfailed_to = \"s3://main/{bucket}/failed/\"\n\
         [drop.profile.sum]\ntask = \"summarise\"\n[drop.profile.ask]\ntask = \"ask\"\ninstruction = \"Who?\"\npriority = 9\n"
    );
    for key in ODD {
        put(&direct, &bucket, &format!("drop/sum/{key}"), key).await;
    }
    for (index, failpoint) in FAILPOINTS.into_iter().enumerate() {
        // One of each kind more, so that every place is come to.
        put(&direct, &bucket, &format!("drop/ask/{index}.txt.job.json"), "{\"labels\": {\"by\": \"test\"}}").await;
        put(&direct, &bucket, &format!("drop/ask/{index}.txt"), &format!("Words {index}.")).await;
        put(&direct, &bucket, &format!("drop/unknown/{index}.txt"), "No profile is for it.").await;
        site.variables.insert("APBD_FAILPOINT".to_owned(), failpoint.to_owned());
        let mut daemon = site.start();
        assert_eq!(daemon.ended(2 * SOON), None, "{failpoint}: killed by a signal");
    }
    site.variables.remove("APBD_FAILPOINT");
    let daemon = site.start();
    let store = site.store().await;
    let count = ODD.len() + FAILPOINTS.len();
    let jobs = settled(&*store, count).await;
    assert!(jobs.iter().all(|job| job.state == JobState::Succeeded), "{jobs:?}");
    let named = documents(&jobs);
    for key in ODD {
        assert!(named.contains(&format!("s3://main/{bucket}/drop/sum/{key}").as_str()), "{key} is not in {named:?}");
    }
    until("every file is where it belongs", || async {
        keys(&direct, &bucket, "drop/").await.is_empty() && keys(&direct, &bucket, "results/").await.len() == count
    })
    .await;
    assert_eq!(rejections(&*store).await, FAILPOINTS.len() as u64, "one row for each that is no job");
    // With each document of the second profile goes what was beside it.
    assert_eq!(keys(&direct, &bucket, "done/").await.len(), count + FAILPOINTS.len());
    assert_eq!(keys(&direct, &bucket, "failed/").await.len(), FAILPOINTS.len());
    let asked = jobs.iter().find(|job| job.document.ends_with("ask/0.txt")).expect("there");
    let detail = store.show(asked.job_id).await.expect("shown").expect("there");
    assert_eq!((detail.message.labels["by"].as_str(), detail.summary.priority.get()), ("test", 9));
    let key = format!("results/{}.json", asked.job_id);
    let got = direct.get(GetRequest { bucket: &bucket, key: &key, ..GetRequest::default() }, 0..1 << 20).await;
    let result: Value = serde_json::from_slice(&got.expect("read").bytes).expect("JSON");
    assert_eq!((&result["state"], &result["labels"]["by"]), (&json!("succeeded"), &json!("test")));
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_any_two_steps_loses_and_doubles_nothing_on_sqlite() {
    crash_everywhere(Site::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_any_two_steps_loses_and_doubles_nothing_on_postgres() {
    crash_everywhere(Site::on_postgres(postgres::shared()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_only_hasten_what_polling_finds() {
    let server = shared();
    let (direct, bucket, store_text) = bucket(server, server.port).await;
    let mut site = Site::new();
    let queue = format!("events-{}", JobId::random());
    // No second look by itself in the time of this test.
    site.extra = format!(
        "{store_text}[[drop]]\nat = \"s3://main/{bucket}/drop/\"\nsettle_s = 1\npoll_s = 3600\nevents_queue = \"{queue}\"\n"
    );
    let publisher = site.publisher().await;
    declare(&publisher, &queue).await;
    let event = |key: &str| {
        json!({ "EventName": "s3:ObjectCreated:Put", "Records": [{ "eventName": "ObjectCreated:Put",
            "s3": { "bucket": { "name": bucket }, "object": { "key": key } } }] })
        .to_string()
    };
    let mut daemon = site.start();
    daemon.ready().await;
    let store = site.store().await;
    for key in ["drop/lost.txt", "drop/first ü.txt", "drop/second.txt"] {
        put(&direct, &bucket, key, key).await;
    }
    let second = event("drop/second.txt");
    let first = event("drop/first+%C3%BC.txt");
    let odd = [event("drop/gone.txt"), event("elsewhere/x"), "no JSON".to_owned()];
    let bodies = [&second, &odd[0], &first, &second, &odd[1], &odd[2], &first];
    let send = async |body: &str| {
        let message = apbd::intake::amqp::Message {
            exchange: "",
            routing_key: &queue,
            id: JobId::random().to_string(),
            correlation_id: None,
            reply_to: None,
            headers: Vec::new(),
            body: body.as_bytes(),
        };
        publisher.publish(&message).await.expect("published");
    };
    for body in bodies {
        send(body).await;
    }
    let jobs = settled(&*store, 2).await;
    let place = |key: &str| format!("s3://main/{bucket}/drop/{key}");
    assert_eq!(documents(&jobs), [place("first ü.txt"), place("second.txt")]);
    send(&second).await;
    put(&direct, &bucket, "drop/second.txt", "Other words.").await;
    send(&second).await;
    settled(&*store, 3).await;
    daemon.kill();
    // The same bytes again are no new version; the one that no event spoke of is found.
    put(&direct, &bucket, "drop/second.txt", "Other words.").await;
    site.extra = site.extra.replace("poll_s = 3600", "poll_s = 1");
    let _again = site.start();
    let jobs = settled(&*store, 4).await;
    assert_eq!(documents(&jobs), [place("first ü.txt"), place("lost.txt"), place("second.txt"), place("second.txt")]);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(all(&*store).await.len(), 4, "nothing is taken twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_ended_jobs_are_moved_and_newer_ones_stay() {
    let mut site = Site::new();
    let [drop, done, out] = ["documents/drop", "documents/done", "out"].map(|name| site.path(name));
    fs::create_dir_all(drop.join("odd")).expect("made");
    let odd = std::ffi::OsStr::from_bytes(b"odd/100% \xff.txt");
    fs::write(drop.join(odd), "Words of an odd name.").expect("written");
    fs::write(drop.join("refused.txt"), "Words.").expect("written");
    fs::write(drop.join("refused.txt.job.json"), "{\"documents\": []}").expect("written");
    fs::write(drop.join("with.txt"), "Words.").expect("written");
    fs::write(drop.join("with.txt.job.json"), "{\"task\": \"ask\", \"instruction\": \"Who?\"}").expect("written");
    fs::write(drop.join(".hidden"), "Not yet.").expect("written");
    site.extra = format!(
        "[results]\nat = \"file://{}\"\n[[drop]]\nat = \"file://{}\"\nsettle_s = 1\npoll_s = 1\nafter = \"move\"\nmove_to = \"file://{}\"\n",
        out.display(),
        drop.display(),
        done.display()
    );
    let _daemon = site.start();
    let store = site.store().await;
    let jobs = settled(&*store, 2).await;
    assert!(jobs.iter().all(|job| job.state == JobState::Succeeded));
    assert!(jobs.iter().any(|job| job.task == apbd::job::Task::Ask));
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    until("they are moved", || async { done.join(odd).exists() && done.join("with.txt.job.json").exists() }).await;
    until("results are written", || async {
        names(&out).iter().filter(|name| name.as_bytes().ends_with(b".json")).count() == 2
    })
    .await;
    assert!(!drop.join(odd).exists() && done.join("with.txt").exists());
    assert!(drop.join("refused.txt").exists(), "what was no success stays");
    assert!(drop.join(".hidden").exists());
    assert_eq!(rejections(&*store).await, 1);
    fs::write(drop.join("with.txt"), "Newer words.").expect("written");
    settled(&*store, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_are_tagged_and_deleted_as_the_policy_says() {
    let server = shared();
    let (direct, bucket, store_text) = bucket(server, server.port).await;
    let mut site = Site::new();
    site.extra = format!(
        "{store_text}[[drop]]\nat = \"s3://main/{bucket}/tagged/\"\nsettle_s = 0\npoll_s = 1\nafter = \"tag\"\ntag = \"seen\"\n\
         [[drop]]\nat = \"s3://main/{bucket}/deleted/\"\nsettle_s = 0\npoll_s = 1\nafter = \"delete\"\nsidecar = \"required\"\n"
    );
    put(&direct, &bucket, "tagged/a b.txt", "Words.").await;
    direct.tag(&bucket, "tagged/a b.txt", "own", "kept: a+b @1").await.expect("tagged");
    put(&direct, &bucket, "deleted/a.txt", "Words.").await;
    put(&direct, &bucket, "deleted/waits.txt", "Words.").await;
    put(&direct, &bucket, "deleted/a.txt.job.json", "{}").await;
    put(&direct, &bucket, "deleted/folder/", "").await;
    let _daemon = site.start();
    let store = site.store().await;
    settled(&*store, 2).await;
    until("one is deleted, the other stays", || async {
        keys(&direct, &bucket, "deleted/").await == ["deleted/folder/", "deleted/waits.txt"]
    })
    .await;
    until("the other is tagged", || async {
        let tags = direct.tags(&bucket, "tagged/a b.txt").await.expect("tags");
        tags.contains(&("seen".to_owned(), "succeeded".to_owned()))
            && tags.contains(&("own".to_owned(), "kept: a+b @1".to_owned()))
    })
    .await;
    put(&direct, &bucket, "deleted/waits.txt.job.json", "{}").await;
    settled(&*store, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_a_store_can_do_and_a_wrong_secret_is_refused() {
    let server = shared();
    let (direct, bucket, store_text) = bucket(server, server.port).await;
    put(&direct, &bucket, "drop/a.txt", "Words.").await;
    let mut site = Site::new();
    site.extra = store_text;
    drop(site.publisher().await);
    let mut daemon = site.start();
    daemon.ready().await;
    let said = |site: &Site| {
        let config = site.configuration(1);
        let output = crate::harness::apbd(&["check", "--config", &config.display().to_string()], &config);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = said(&site);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("conditional GET works") && text.contains("with entity tags"), "{text}");
    site.extra = site.extra.replace(&server.secret_access_key, "wrong");
    let (code, text) = said(&site);
    assert_eq!(code, Some(69), "{text}");
    assert!(text.contains("refuses the credentials: SignatureDoesNotMatch"), "{text}");
    let wrong = client(server, server.port, "wrong");
    let error = wrong.put(&bucket, "x", "text/plain", Vec::new()).await.expect_err("the signature is checked");
    assert!(matches!(error, ObjectError::Credentials { .. }), "{error}");
    daemon.kill();
}

/// Peak memory of this process in bytes.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

/// Files of a large drop folder, and what they may take of this process's memory.
const MANY: usize = 100_000;
const GROWTH_BYTES: u64 = 64 << 20;

/// Looks twice at a place with so many files, and prints what that took as a line of JSON.
async fn look_at_many(name: &str, at: &str, stores: Vec<ObjectClient>, site: &Site) {
    let store = open(&site.database, Access::Worker, RetryPolicy::default()).await.expect("opened");
    let profile = DropProfile {
        task: Task::Summarise,
        instruction: None,
        template: None,
        schema: None,
        model: None,
        priority: Priority::NORMAL,
    };
    let drops = DropFolder {
        place: DropPlace {
            at: at.parse().expect("a URI"),
            profiles: Profiles::One(Box::new(profile)),
            sidecars: Sidecars::Optional,
            settle: Duration::ZERO,
            poll: Duration::from_secs(1),
            disposal: Disposal::Leave,
            events_queue: None,
        },
        stores,
        documents: Arc::new(FileSource),
        store: store.clone(),
        max_document_bytes: 1 << 20,
        events: None,
        health: Health::default().component("drops"),
    };
    let (_handle, shutdown) = shutdown::channel();
    let (before, start) = (peak_bytes(), Instant::now());
    assert_eq!(drops.look(&shutdown).await.expect("looked"), MANY as u64);
    let first = start.elapsed();
    assert_eq!(drops.look(&shutdown).await.expect("looked"), 0, "nothing is taken twice");
    let (second, grown) = (start.elapsed() - first, peak_bytes() - before);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{}",
        json!({ "drop_folder": name, "files": MANY, "first_look_s": first.as_secs_f64(), "second_look_s": second.as_secs_f64(),
            "more_at_the_peak_mib": grown >> 20, "cores": cores, "load_average": load.split(' ').next(),
            "build": if cfg!(debug_assertions) { "debug" } else { "release" } })
    );
    assert_eq!(store.inbox_depth(None, 1 << 20).await.expect("asked").queued, MANY as u64);
    assert!(grown < GROWTH_BYTES, "{grown} bytes");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes 100,000 files; shows its figures with --nocapture, results/drop_folder.jsonl is a run"]
async fn a_hundred_thousand_files_are_taken_in_bounded_memory() {
    let site = Site::new();
    let folder = site.path("many");
    for index in 0..MANY {
        let part = folder.join(format!("{:02}", index % 10));
        fs::create_dir_all(&part).expect("made");
        fs::write(part.join(format!("a rather long name of a document {index:06}.txt")), format!("Words {index}."))
            .expect("written");
    }
    look_at_many("folder, SQLite", &format!("file://{}", folder.display()), Vec::new(), &site).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes 100,000 objects; shows its figures with --nocapture, results/drop_folder.jsonl is a run"]
async fn a_hundred_thousand_objects_are_taken_in_bounded_memory() {
    let (server, site) = (S3::with_many("many", MANY), Site::on_postgres(postgres::shared()).await);
    // The server of the tests looks through all of its objects for each page.
    let client = patient_client(&server, server.port, &server.secret_access_key, SOON);
    look_at_many("S3, PostgreSQL", "s3://main/many/drop/", vec![client], &site).await;
}
