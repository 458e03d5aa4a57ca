//! Several daemons on one PostgreSQL: whatever dies or stops, each job has one effect and none is lost. Counted from outside, by SQL
//! and on the queues.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use apbd::job::JobId;
use apbd::store::{JobState, Store};
use futures_util::future::join_all;
use lapin::options::BasicGetOptions;
use serde_json::{Value, json};

use crate::drops::FAILPOINTS;
use crate::harness::{Daemon, SOON, Site, declare, settled, sql, succeeded, until, waiting};
use crate::services::postgres::{Postgres, shared};
use crate::services::proxy::{Fault, Proxy};
use crate::services::s3;

/// Every named place, and the visit at which the daemon dies there.
const PLACES: [&str; 18] = [
    "intake.delivered",
    "intake.committed",
    "intake.acked",
    "intake.rejected",
    "intake.dead_lettered",
    "publish.unconfirmed",
    "claim.committed:20",
    "claim.prepared:7",
    "engine.asked:3",
    "engine.progressed",
    "engine.answered:5",
    "record.begun:9",
    "record.uncommitted:4",
    "record.committed:6",
    "outbox.taken",
    "publish.unconfirmed:8",
    "outbox.sent:11",
    "outbox.confirmed:2",
];

async fn is_running(store: &dyn Store, job: JobId) -> bool {
    let detail = store.show(job).await.expect("shown");
    detail.is_some_and(|detail| detail.summary.state == JobState::Running && detail.summary.progress.is_some())
}

/// Event ids by job of everything that waits in a queue.
async fn replies(channel: &lapin::Channel, queue: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut events: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    while let Some(got) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.expect("asked") {
        let event: Value = serde_json::from_slice(&got.delivery.data).expect("JSON");
        let text = |key: &str| event[key].as_str().expect("a text").to_owned();
        events.entry(text("job_id")).or_default().insert(text("event_id"));
    }
    events
}

/// Names in calls of the program's `failpoint::reach`.
fn places_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        if entry.path().is_dir() {
            places_below(&entry.path(), found);
            continue;
        }
        let text = fs::read_to_string(entry.path()).expect("text");
        let calls = text.split("failpoint::reach(\"").skip(1);
        found.extend(calls.filter_map(|call| Some(call.split_once('"')?.0.to_owned())));
    }
}

#[test]
fn no_named_place_is_left_out() {
    let mut named = BTreeSet::new();
    places_below(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut named);
    let died_at = PLACES.iter().chain(&FAILPOINTS).filter_map(|place| place.split(':').next());
    assert_eq!(died_at.map(str::to_owned).collect::<BTreeSet<_>>(), named);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_of_a_thousand_is_lost_wherever_the_daemon_dies() {
    let mut site = Site::on_postgres(shared()).await;
    let (publisher, done) = (site.publisher().await, format!("done-{}", JobId::random()));
    declare(&publisher, &done).await;
    let (mut jobs, mut refused) = (0, 0);
    for (round, place) in PLACES.iter().enumerate() {
        let (job, bad) = (site.lasting(2), json!({ "version": 2, "round": round }));
        let mut other = job.clone();
        other["seed"] = json!(0);
        let count = 981 * (round + 1) / PLACES.len() - jobs;
        site.send_raw(&publisher, JobId::random(), &bad, None).await;
        site.send_raw(&publisher, JobId::random(), &job, Some(&done)).await;
        join_all((1..count).map(|_| site.send_raw(&publisher, JobId::random(), &other, Some(&done)))).await;
        (jobs, refused) = (jobs + count, refused + 1);
        site.variables.insert("APBD_FAILPOINT".to_owned(), (*place).to_owned());
        let mut daemon = site.start();
        assert_eq!(daemon.ended(2 * SOON), None, "killed at {place}");
    }
    site.send_raw(&publisher, JobId::random(), &json!("no job"), None).await;
    site.variables.remove("APBD_FAILPOINT");
    let _daemon = site.start();
    settled(&*site.store().await, jobs).await;
    until("the queue is empty", || async { waiting(&publisher, &site.queue).await == 0 }).await;
    let count = |query: &str| sql(shared(), &site, query).parse::<usize>().expect("a number");
    until("every rejection has its row", || async { count("SELECT count(*) FROM rejections") == refused + 1 }).await;
    let results = count("SELECT count(*) FROM results");
    let given_up = count("SELECT count(*) FROM jobs WHERE state IN ('failed', 'dead')");
    assert_eq!(results + given_up + refused + 1, 1000);
    until("every event is confirmed", || async { count("SELECT count(*) FROM outbox") == 0 }).await;
    let replies = replies(publisher.channel(), &done).await;
    assert_eq!(replies.len(), jobs);
    assert!(replies.values().all(|ids| ids.len() == 1), "one event id a job, however often it was sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn four_daemons_and_every_message_three_times_give_one_result_and_one_reply_a_job() {
    let site = Site::on_postgres(shared()).await;
    let (publisher, done) = (site.publisher().await, format!("done-{}", JobId::random()));
    declare(&publisher, &done).await;
    let daemons: Vec<Daemon> = (0..4).map(|_| site.start()).collect();
    let mut body = site.lasting(1);
    body["seed"] = json!(0);
    let mut other = body.clone();
    other["seed"] = json!(7);
    let jobs: Vec<JobId> = (0..1000).map(|_| JobId::random()).collect();
    for _ in 0..3 {
        join_all(jobs.iter().map(|job| site.send_raw(&publisher, *job, &body, Some(&done)))).await;
    }
    let store = site.store().await;
    settled(&*store, 1000).await;
    join_all(jobs.iter().take(10).map(|job| site.send_raw(&publisher, *job, &other, Some(&done)))).await;
    let count = |query: &str| sql(shared(), &site, query).parse::<usize>().expect("a number");
    let conflicts = "SELECT count(*) FROM rejections WHERE code = 'payload_conflict'";
    until("conflicts have rows", || async { count(conflicts) == 10 }).await;
    let dead = format!("{}.dead", site.queue);
    until("conflicts are dead letters", || async { waiting(&publisher, &dead).await == 10 }).await;
    until("every event is confirmed", || async { count("SELECT count(*) FROM outbox") == 0 }).await;
    assert_eq!(count("SELECT count(*) FROM results"), 1000);
    assert_eq!(count("SELECT count(*) FROM attempts"), 1000, "nothing ran twice");
    assert!(count("SELECT count(DISTINCT worker) FROM attempts") > 1, "they share the work");
    assert_eq!(waiting(&publisher, &done).await, 1000, "one reply a job");
    let replies = replies(publisher.channel(), &done).await;
    assert!(replies.len() == 1000 && replies.values().all(|ids| ids.len() == 1));
    drop(daemons);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_was_stopped_past_its_lease_writes_nothing() {
    let site = Site::on_postgres(shared()).await;
    let stale = site.start();
    stale.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(20), None).await;
    until("it runs", || is_running(&*store, job)).await;
    stale.signal("STOP");
    let _other = site.start();
    let detail = succeeded(&*store, job).await;
    assert_eq!(detail.summary.attempt.get(), 2);
    let rows = || {
        let query = "SELECT json_agg(j) FROM jobs j UNION ALL SELECT json_agg(a ORDER BY attempt) FROM attempts a \
                     UNION ALL SELECT json_agg(r) FROM results r UNION ALL SELECT json_agg(d) FROM documents d";
        sql(shared(), &site, query)
    };
    let before = rows();
    stale.signal("CONT");
    until("it notices", || async { stale.log().contains("another worker has the job by now") }).await;
    assert_eq!(rows(), before, "the stale daemon changed something");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_gone_for_half_a_minute_costs_no_result() {
    let mut server = Postgres::start();
    let site = Site::on_postgres(&server).await;
    let mut daemons = [site.start(), site.start()];
    daemons[0].ready().await;
    daemons[1].ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(15), None).await;
    until("it runs", || is_running(&*store, job)).await;
    server.stop();
    let meanwhile = JobId::random();
    site.send_raw(&publisher, meanwhile, &site.lasting(1), None).await;
    // Ten leases: the outage itself, not a proof.
    tokio::time::sleep(Duration::from_secs(30)).await;
    server.restart();
    for job in [job, meanwhile] {
        let detail = succeeded(&*store, job).await;
        assert_eq!((detail.attempts.len(), detail.failures.suspect), (1, 0), "it ran once");
    }
    assert_eq!(sql(&server, &site, "SELECT count(*) FROM results"), "2");
    assert!(daemons.iter_mut().all(Daemon::is_running), "nobody gave up");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_delivery_stays_unacked_while_a_long_job_runs() {
    let site = Site::on_postgres(shared()).await;
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(600), None).await;
    until("it runs", || is_running(&*store, job)).await;
    drop(daemon);
    // What had been unacked would be ready again, now that its consumer is gone.
    let still = JobId::random();
    site.send_raw(&publisher, still, &site.lasting(1), None).await;
    until("the queue has the other one", || async { waiting(&publisher, &site.queue).await >= 1 }).await;
    assert_eq!(waiting(&publisher, &site.queue).await, 1, "the long job's message was acked when it was taken in");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_end_what_can_end_within_the_grace() {
    let site = Site::on_postgres(shared()).await;
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(18), None).await;
    until("it runs", || is_running(&*store, job)).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended(SOON), Some(0));
    assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drops_a_document_that_comes_too_slowly() {
    let server = s3::shared();
    let proxy = Proxy::to(server.port).await;
    let mut site = Site::on_postgres(shared()).await;
    site.extra = format!(
        "[[store]]\nalias = \"main\"\nendpoint = \"http://127.0.0.1:{}\"\nallow_http = true\naccess_key_id = \"{}\"\n\
         secret_access_key = \"{}\"\nallowed = [\"slow\"]\nsilence_s = 600\n",
        proxy.port(),
        server.access_key_id,
        server.secret_access_key
    );
    proxy.set(Fault::HalfOpen);
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    let body = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": "s3://main/slow/a.txt" }] });
    site.send_raw(&publisher, job, &body, None).await;
    until("it is fetched", || is_running(&*store, job)).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended(SOON), Some(0));
    let detail = store.show(job).await.expect("shown").expect("there");
    assert_eq!(detail.summary.state, JobState::Queued);
    assert_eq!((detail.failures.suspect, detail.failures.infra), (0, 0), "no attempt is spent");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_a_daemon_whose_database_is_gone() {
    let mut server = Postgres::start();
    let site = Site::on_postgres(&server).await;
    let mut daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(10), None).await;
    until("it runs", || is_running(&*store, job)).await;
    server.stop();
    until("the result can not be written", || async { daemon.log().contains("\"store.operation\":\"finish\"") }).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended(SOON), Some(0));
    server.restart();
    let _second = site.start();
    succeeded(&*store, job).await;
    assert_eq!(sql(&server, &site, "SELECT count(*) FROM results"), "1");
}
