//! What the broker may do to those who consume and publish: cut off who holds a delivery for too long, block who publishes, give back what has
//! no queue.

use std::time::Duration;

use apbd::intake::amqp::{Message, Publisher};
use apbd::job::JobId;
use apbd::store::JobState;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use serde_json::Value;

use crate::harness::{Site, all, declare, message, succeeded, until, waiting};
use crate::services::rabbitmq::RabbitMq;

/// The shortest that there is any use in: the broker of Debian 12 looks at it every minute, here every second.
const CONSUMER_TIMEOUT: Duration = Duration::from_secs(5);

/// A consumer that never acks; its channel.
async fn hold_a_delivery(publisher: &Publisher, queue: &str) -> lapin::Consumer {
    declare(publisher, queue).await;
    let (exchange, id) = ("", JobId::random().to_string());
    let message = Message {
        exchange,
        routing_key: queue,
        id,
        correlation_id: None,
        reply_to: None,
        headers: Vec::new(),
        body: b"{}",
    };
    publisher.publish(&message).await.expect("published");
    let consuming = publisher.channel().basic_consume(
        queue.into(),
        "".into(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    consuming.await.expect("consumes")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_three_times_as_long_as_the_consumer_timeout_is_delivered_once() {
    let broker = RabbitMq::start(&format!("consumer_timeout = {}", CONSUMER_TIMEOUT.as_millis()));
    let site = Site::on(&broker.url());
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = JobId::random();
    site.send_raw(&publisher, job, &site.lasting(3 * CONSUMER_TIMEOUT.as_secs() as u32 * 10), None).await;
    // Who acks late is cut off meanwhile, and gets its message again.
    let careless = site.publisher().await;
    let _held = hold_a_delivery(&careless, &format!("held-{job}")).await;
    until("the broker cuts it off", || async { !careless.channel().status().connected() }).await;

    let detail = succeeded(&*store, job).await;
    let times = detail.summary.started_at.zip(detail.summary.finished_at).expect("it ran");
    assert!((times.1 - times.0).to_std().expect("forwards") >= 3 * CONSUMER_TIMEOUT);
    assert_eq!((detail.attempts.len(), all(&*store).await.len()), (1, 1));
    assert_eq!(waiting(&publisher, &site.queue).await, 0);
    let (_, metrics) = daemon.get("/metrics").expect("an answer");
    assert!(metrics.contains("apbd_intake_total{answer=\"inserted\"} 1"), "{metrics}");
    assert!(!metrics.contains("apbd_intake_total{answer=\"duplicate\"}"), "it was delivered again: {metrics}");
    assert!(!daemon.log().contains("the broker is not consumed from"), "its consumer was cut off");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_blocks_publishers_delays_events_and_nothing_else() {
    let broker = RabbitMq::start("");
    let site = Site::on(&broker.url());
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let done = format!("done-{}", JobId::random());
    declare(&publisher, &done).await;
    let (job, waits) = (JobId::random(), JobId::random());
    // Both are with the daemon before nobody can publish, and the first ends only then.
    site.send_raw(&publisher, job, &site.lasting(6000), Some(&done)).await;
    site.send_raw(&publisher, waits, &site.lasting(1), None).await;
    until("they are taken in", || async { all(&*store).await.len() == 2 }).await;
    broker.block_publishers(true);
    store.cancel(job).await.expect("cancelled");
    assert_eq!(succeeded(&*store, waits).await.attempts.len(), 1);
    until("it says why the event waits", || async { daemon.log().contains("the broker has blocked the connection") })
        .await;
    assert_eq!(waiting(&publisher, &done).await, 0);
    broker.block_publishers(false);
    let event = async || -> Value {
        let delivery = message(&publisher, &done).await;
        serde_json::from_slice(&delivery.data).expect("JSON")
    };
    let first = event().await;
    assert_eq!((first["job_id"].as_str(), first["state"].as_str()), (Some(&*job.to_string()), Some("cancelled")));
    let next = site.send(&publisher, 0).await;
    succeeded(&*store, next).await;
    daemon.ready().await;
    // Where the block was longer than a confirm is waited for, it was sent again.
    while waiting(&publisher, &done).await > 0 {
        assert_eq!(event().await, first, "one event, however often it is sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_for_a_queue_that_is_not_there_waits_for_it() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let (job, done) = (JobId::random(), format!("done-{}", JobId::random()));
    site.send_raw(&publisher, job, &site.lasting(1), Some(&done)).await;
    succeeded(&*store, job).await;
    until("the broker gave it back", || async { daemon.log().contains("a completion event was not taken") }).await;
    declare(&publisher, &done).await;
    let event: Value = serde_json::from_slice(&message(&publisher, &done).await.data).expect("JSON");
    assert_eq!(event["job_id"].as_str(), Some(&*job.to_string()));
    assert_eq!(store.show(job).await.expect("shown").expect("there").summary.state, JobState::Succeeded);
}
