//! Several requests in one engine: each goes its own way, and what one of them does to the engine costs the others no attempt.

use apbd::job::{ErrorCode, JobId};
use apbd::store::{JobState, Store};

use crate::harness::{Site, ended, settled, succeeded, until};

/// Waits until all of these are in the engine at the same time.
async fn together(store: &dyn Store, jobs: &[JobId]) {
    until("all of them generate at the same time", || async {
        let mut all = true;
        for job in jobs {
            let detail = store.show(*job).await.expect("shown");
            all &= detail.is_some_and(|detail| detail.summary.progress.is_some_and(|progress| progress.done > 0));
        }
        all
    })
    .await;
}

/// Why the first attempt of a job that was counted gave nothing.
async fn why(store: &dyn Store, job: JobId) -> ErrorCode {
    let detail = store.show(job).await.expect("shown").expect("there");
    let reasons = detail.attempts.into_iter().filter_map(|attempt| attempt.error).map(|error| error.code);
    reasons.into_iter().find(|code| *code != ErrorCode::EngineUnavailable).expect("a reason")
}

#[tokio::test(flavor = "multi_thread")]
async fn several_run_side_by_side_and_a_cancel_stops_the_one_that_it_is_for() {
    let site = Site::with_concurrency(4);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let mut jobs = Vec::new();
    for _ in 0..4 {
        jobs.push(site.send_lasting(&publisher, 60).await);
    }
    together(&*store, &jobs).await;
    store.cancel(jobs[1]).await.expect("asked");
    assert_eq!(ended(&*store, jobs.remove(1)).await.summary.state, JobState::Cancelled);
    for job in jobs {
        assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_documents_the_one_that_kills_the_engine_is_quarantined_and_no_other_is_counted() {
    let site = Site::with_concurrency(4);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    let (mut neighbours, mut poison) = (Vec::new(), None);
    for number in 0..50 {
        match number {
            7 => poison = Some(site.send(&publisher, 1).await),
            _ => neighbours.push(site.send_lasting(&publisher, 3).await),
        }
    }
    settled(&*store, 50).await;
    for job in neighbours {
        assert_eq!(succeeded(&*store, job).await.failures.suspect, 0, "it was beside the poison, and is not to blame");
    }
    let detail = ended(&*store, poison.expect("sent")).await;
    assert_eq!((detail.summary.state, detail.attempts.len()), (JobState::Dead, 2));
    assert_eq!(detail.summary.error.expect("a reason").code, ErrorCode::EngineCrashed);
    let ends: Vec<String> =
        daemon.log().lines().filter(|line| line.contains("is replaced")).map(str::to_owned).collect();
    assert!(ends[0].contains("\"engine.requests\":4"), "it took others with it, once: {ends:?}");
    assert!(ends[1..].iter().all(|line| line.contains("\"engine.requests\":1")), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_device_and_a_silent_process_cost_their_neighbours_nothing() {
    let site = Site::with_concurrency(3);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    for (seed, code) in [(3, ErrorCode::DeviceFailed), (2, ErrorCode::EngineHung)] {
        let neighbours = [site.send_lasting(&publisher, 20).await, site.send_lasting(&publisher, 20).await];
        together(&*store, &neighbours).await;
        let bad = site.send(&publisher, seed).await;
        until("it is caught", || async {
            store.show(bad).await.expect("shown").is_some_and(|detail| detail.failures.suspect == 1)
        })
        .await;
        store.cancel(bad).await.expect("cancelled");
        assert_eq!(why(&*store, bad).await, code);
        for job in neighbours {
            assert_eq!(succeeded(&*store, job).await.failures.suspect, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_stands_still_while_others_go_on_ends_alone() {
    let site = Site::with_concurrency(2);
    let daemon = site.start();
    daemon.ready().await;
    let (publisher, store) = (site.publisher().await, site.store().await);
    // One that ends when it is told to, and one for which the whole engine has to end.
    for (seed, engine_ends) in [(7, false), (9, true)] {
        let neighbour = site.send_lasting(&publisher, 120).await;
        together(&*store, &[neighbour]).await;
        let ends = daemon.log().matches("is replaced").count();
        let still = site.send(&publisher, seed).await;
        until("it is given up", || async {
            store.show(still).await.expect("shown").is_some_and(|detail| detail.failures.suspect == 1)
        })
        .await;
        store.cancel(still).await.expect("cancelled");
        assert_eq!(why(&*store, still).await, ErrorCode::EngineHung);
        assert_eq!(daemon.log().matches("is replaced").count() > ends, engine_ends, "{}", daemon.log());
        // Where the engine ended it has begun anew, in the same attempt.
        let detail = succeeded(&*store, neighbour).await;
        assert_eq!((detail.failures.suspect, detail.attempts.len()), (0, 1));
    }
}
