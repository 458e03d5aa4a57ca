//! Engines that die, hang or break: each costs its own job only.

use apbd::job::ErrorCode;
use apbd::store::JobState;

use crate::harness::{Site, ended, settled, succeeded, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_kills_the_engine_is_quarantined_and_its_neighbours_succeed() {
    let mut site = Site::new();
    site.extra = String::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut neighbours = Vec::new();
    let mut poison = None;
    for number in 0..20 {
        match number {
            7 => poison = Some(site.send(&publisher, 1).await),
            _ => neighbours.push(site.send(&publisher, 0).await),
        }
    }
    settled(&*store, 20).await;
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
async fn a_running_job_is_cancelled() {
    let site = Site::new();
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let job = site.send(&publisher, 4).await;
    until("it runs", || async {
        store.show(job).await.expect("shown").is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    store.cancel(job).await.expect("asked");
    assert_eq!(ended(&*store, job).await.summary.state, JobState::Cancelled);
}
