//! Jobs from the queue: taken in once, refused with a reason, paused when there are too many, and back after every fault.

use std::time::Duration;

use apbd::job::{ErrorCode, JobId};
use apbd::store::{JobState, ReportView};
use serde_json::json;

use crate::harness::{
    CONSUMING_AGAIN, Site, all, consumes_again, declare, ended, message, settled, succeeded, until, waiting,
};
use crate::services::proxy::{Fault, Proxy};
use crate::services::rabbitmq::{RabbitMq, shared};

#[tokio::test(flavor = "multi_thread")]
async fn a_message_sent_three_times_is_one_job_with_one_reply() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let replies = format!("done-{}", JobId::random());
    declare(&publisher, &replies).await;
    let id = JobId::random();
    let uri = site.document("a b.txt", "Some words.");
    let uri = uri.replace(' ', "%20");
    let body = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }] });
    for _ in 0..3 {
        site.send_raw(&publisher, id, &body, Some(&replies)).await;
    }
    let other = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }], "seed": 9 });
    site.send_raw(&publisher, id, &other, None).await;
    let detail = succeeded(&*store, id).await;
    assert_eq!(detail.attempts.len(), 1);
    let reply = message(&publisher, &replies).await;
    let event: serde_json::Value = serde_json::from_slice(&reply.data).expect("JSON");
    assert_eq!((event["job_id"].as_str(), event["state"].as_str()), (Some(id.to_string().as_str()), Some("succeeded")));
    assert_eq!(reply.properties.correlation_id().as_ref().expect("a mark").as_str(), "mark");
    let dead = message(&publisher, &format!("{}.dead", site.queue)).await;
    let headers = dead.properties.headers().as_ref().expect("headers").inner();
    let code = headers.get("x-apbd-code").and_then(|code| code.as_long_string()).expect("a code").to_string();
    assert_eq!(code, ErrorCode::PayloadConflict.as_str());
    assert_eq!(all(&*store).await.len(), 1);
    assert_eq!(waiting(&publisher, &replies).await, 0, "one reply a job");
    assert_eq!(waiting(&publisher, &site.queue).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_job_is_dead_lettered_with_its_reason_and_leaves_a_row() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let documents = json!([{ "uri": "file:///etc/passwd" }]);
    let bad = [
        (json!("word"), ErrorCode::MessageInvalid),
        (json!({ "version": 2 }), ErrorCode::MessageInvalid),
        (json!({ "version": 1, "task": "summarise", "documents": documents }), ErrorCode::LocationNotAllowed),
    ];
    for (body, _) in &bad {
        site.send_raw(&publisher, JobId::random(), body, None).await;
    }
    let plain = format!("file://{}", site.path("documents/plain.txt").display());
    let good = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": plain }] });
    site.send_raw(&publisher, JobId::random(), &good, Some("somebody-elses-queue")).await;
    let mut codes = Vec::new();
    for _ in 0..4 {
        let dead = message(&publisher, &format!("{}.dead", site.queue)).await;
        let headers = dead.properties.headers().as_ref().expect("headers").inner().clone();
        assert!(headers.contains_key("x-apbd-reason"));
        codes.push(headers["x-apbd-code"].as_long_string().expect("a code").to_string());
    }
    codes.sort();
    assert_eq!(codes, ["location_not_allowed", "message_invalid", "message_invalid", "reply_not_allowed"]);
    let rows = store.report(ReportView::Failures, 100).await.expect("reported").rows;
    assert!(rows.len() >= 3, "{rows:?}");
    assert!(all(&*store).await.is_empty());
    assert!(!daemon.log().contains("passwd"), "no location of a message in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn intake_stops_while_the_inbox_is_full_and_resumes_by_itself() {
    let mut site = Site::new();
    site.variables.insert("APBD_AMQP_WINDOW".to_owned(), "5".to_owned());
    site.variables.insert("APBD_AMQP_PREFETCH".to_owned(), "2".to_owned());
    let publisher = site.publisher().await;
    for _ in 0..30 {
        site.send(&publisher, 4).await;
    }
    let daemon = site.start();
    let store = site.store().await;
    until("the window is full", || async { store.inbox_depth(None, 100).await.is_ok_and(|depth| depth.queued >= 5) })
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let depth = store.inbox_depth(None, 100).await.expect("counted");
    assert!(depth.queued <= 20, "{depth:?}");
    assert!(waiting(&publisher, &site.queue).await >= 8, "the broker keeps the rest");
    for job in all(&*store).await {
        store.cancel(job.job_id).await.expect("cancelled");
    }
    until("it resumes", || async { all(&*store).await.len() > depth.queued as usize + 4 }).await;
    drop(daemon);
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_and_half_open_connections_are_survived() {
    let proxy = Proxy::to(shared().port()).await;
    let direct = Site::new();
    let mut site = Site::on(&RabbitMq::url_at(proxy.port()));
    site.queue.clone_from(&direct.queue);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (direct.publisher().await, site.store().await);
    let first = site.send(&publisher, 0).await;
    succeeded(&*store, first).await;
    // It is worked on all the while.
    let long = JobId::random();
    site.send_raw(&publisher, long, &site.lasting(300), None).await;
    until("it runs", || async {
        store.show(long).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    let urgent = || {
        let mut body = site.lasting(1);
        (body["priority"], body["seed"]) = (json!(9), json!(0));
        body
    };
    let [second, third] = [JobId::random(), JobId::random()];
    let is_taken_in = async |job: JobId| {
        let taken = until("it is taken in", || async { store.show(job).await.expect("shown").is_some() });
        tokio::time::timeout(CONSUMING_AGAIN, taken).await.expect("it consumes again in time");
    };
    proxy.cut();
    site.send_raw(&publisher, second, &urgent(), None).await;
    is_taken_in(second).await;
    proxy.set(Fault::HalfOpen);
    site.send_raw(&publisher, third, &urgent(), None).await;
    until("the silence is noticed", || async { daemon.get("/readyz").is_some_and(|(status, _)| status == 503) }).await;
    proxy.set(Fault::None);
    is_taken_in(third).await;
    let jobs = settled(&*store, 4).await;
    assert!(jobs.iter().all(|job| job.attempt.get() == 1), "nothing reran");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_made_again() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let store = site.store().await;
    {
        let publisher = site.publisher().await;
        let options = lapin::options::QueueDeleteOptions::default();
        publisher.channel().queue_delete(site.queue.as_str().into(), options).await.expect("deleted");
    }
    until("the cancel is noticed", || async { daemon.log().contains("cancelled the consumer") }).await;
    let publisher = site.publisher().await;
    let job = site.send(&publisher, 0).await;
    consumes_again(&*store, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_is_survived_and_nothing_reruns() {
    let mut broker = RabbitMq::start("");
    let site = Site::on(&broker.url());
    let daemon = site.start();
    daemon.ready().await;
    let store = site.store().await;
    // A quorum queue that is younger than this may not come back from a power cut on old versions of the broker.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let long = {
        let publisher = site.publisher().await;
        site.send(&publisher, 4).await
    };
    until("it runs", || async {
        store.show(long).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    broker.restart();
    tokio::time::timeout(CONSUMING_AGAIN, daemon.ready()).await.expect("it consumes again in time");
    let publisher = site.publisher().await;
    let last = site.send(&publisher, 0).await;
    succeeded(&*store, last).await;
    let detail = ended(&*store, long).await;
    assert_eq!((detail.summary.state, detail.attempts.len()), (JobState::Succeeded, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_lost_when_the_daemon_dies_anywhere() {
    let mut site = Site::new();
    // A job may be in the engine at any of the kills, and is not to be quarantined for them.
    site.variables.insert("APBD_WORK_MAX_ATTEMPTS".to_owned(), "20".to_owned());
    let publisher = site.publisher().await;
    let mut sent = Vec::new();
    for _ in 0..40 {
        sent.push(site.send(&publisher, 0).await);
    }
    site.send_raw(&publisher, JobId::random(), &json!("no job"), None).await;
    let places = ["intake.delivered", "intake.committed", "intake.acked", "intake.rejected", "intake.dead_lettered"];
    for place in places {
        site.variables.insert("APBD_FAILPOINT".to_owned(), place.to_owned());
        let mut daemon = site.start();
        // Signal 6 ends it there; a place that it does not come to any more leaves it serving.
        let start = std::time::Instant::now();
        while daemon.is_running() && start.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        daemon.kill();
    }
    site.variables.remove("APBD_FAILPOINT");
    let daemon = site.start();
    daemon.ready().await;
    let store = site.store().await;
    let jobs = settled(&*store, sent.len()).await;
    assert!(jobs.iter().all(|job| job.state == JobState::Succeeded && sent.contains(&job.job_id)));
    let dead = message(&publisher, &format!("{}.dead", site.queue)).await;
    assert_eq!(dead.data, b"\"no job\"");
    until("the queue is empty", || async { waiting(&publisher, &site.queue).await == 0 }).await;
}
