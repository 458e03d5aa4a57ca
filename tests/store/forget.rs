//! Forgetting what ended long ago: the same on both stores.

use std::time::Duration;

use apbd::job::retry::Verdict;
use apbd::job::{Digest, ErrorCode, JobId, JobMessage};
use apbd::store::{DropFate, DropMark, DropSighting, Forgotten, NewJob, Reply, Store};

use crate::suite::{Fresh, add, claim, errored, message, new_job, rejection, succeeded};

const ALL: u32 = 100;

async fn forget(store: &dyn Store) -> u64 {
    store.forget(Duration::ZERO, ALL).await.expect("forgotten").jobs
}

/// Ends all that waits, as it is said of each.
async fn end_all(store: &dyn Store, verdict: impl Fn(JobId) -> Option<Verdict>) {
    for claim in claim(store, ALL).await {
        let report = match verdict(claim.job.id) {
            None => succeeded(),
            Some(verdict) => errored(ErrorCode::EngineCrashed, verdict),
        };
        assert!(store.finish(&claim.lease(), &report).await.expect("finished"));
    }
    // The clock has moved on since.
    tokio::time::sleep(Duration::from_millis(5)).await;
}

async fn is_there(store: &dyn Store, job: JobId) -> bool {
    store.show(job).await.expect("shown").is_some()
}

pub async fn what_ended_is_forgotten_with_all_that_hangs_on_it(fresh: Fresh) {
    let store = &*fresh.store;
    let ended = [add(store, message("file:///a")).await, add(store, message("file:///b")).await];
    let dead = add(store, message("file:///c")).await;
    end_all(store, |job| match job {
        job if job == dead => Some(Verdict::Quarantine),
        job if job == ended[1] => Some(Verdict::Fail),
        _ => None,
    })
    .await;
    let running = add(store, message("file:///d")).await;
    assert_eq!(claim(store, 1).await.len(), 1);
    let (cancelled, waiting) = (add(store, message("file:///e")).await, add(store, message("file:///f")).await);
    store.cancel(cancelled).await.expect("cancelled");
    tokio::time::sleep(Duration::from_millis(5)).await;

    let young = store.forget(Duration::from_secs(3600), ALL).await.expect("nothing");
    assert_eq!(young, Forgotten::default(), "all of them ended just now");
    assert_eq!(store.forget(Duration::ZERO, 1).await.expect("one").jobs, 1);
    assert_eq!(forget(store).await, 2);
    assert_eq!(forget(store).await, 0);
    for job in [ended[0], ended[1], cancelled] {
        assert!(!is_there(store, job).await);
    }
    for job in [dead, running, waiting] {
        assert!(is_there(store, job).await);
    }
    let again = JobMessage { job_id: Some(ended[0]), ..message("file:///a") };
    assert_eq!(add(store, again).await, ended[0], "it is new");
}

pub async fn what_somebody_still_waits_for_is_kept(fresh: Fresh) {
    let store = &*fresh.store;
    let reply = Reply { target: "replies".to_owned(), correlation_id: None };
    let told = NewJob { reply: Some(reply), ..new_job(message("file:///a")) };
    store.enqueue(std::slice::from_ref(&told)).await.expect("enqueued");
    end_all(store, |_| None).await;

    let place = "s3://main/b/drop/";
    let dropped = add(store, message("s3://main/b/drop/x")).await;
    let (file, version) = (Digest::of_bytes(b"x"), "1".to_owned());
    let uri = format!("{place}x");
    let seen = DropSighting { file, is_sidecar: false, uri, version, etag: None, size_bytes: 3, fault: None };
    let mark = |fate| DropMark { file, version: "1".to_owned(), fate };
    store.drop_seen(place, &[seen]).await.expect("remembered");
    store.drop_mark(place, &[mark(DropFate::Taken(dropped))]).await.expect("marked");
    end_all(store, |_| None).await;

    store.export_want("file:///out").await.expect("wanted");
    let exported = add(store, message("file:///c")).await;
    end_all(store, |_| None).await;

    assert_eq!(forget(store).await, 0);
    let event = store.outbox_take(1, Duration::from_secs(60)).await.expect("taken").remove(0);
    store.outbox_confirm(&[event.event_id]).await.expect("confirmed");
    assert_eq!(forget(store).await, 1);
    assert!(!is_there(store, told.job.id).await && is_there(store, dropped).await);
    store.drop_mark(place, &[mark(DropFate::Disposed(None))]).await.expect("marked");
    assert_eq!(forget(store).await, 1);
    assert!(!is_there(store, dropped).await && is_there(store, exported).await);
    let export = store.export_take("file:///out", 1, Duration::from_secs(60)).await.expect("taken").remove(0);
    store.export_done("file:///out", export).await.expect("done");
    assert_eq!(forget(store).await, 1);
}

pub async fn rejections_are_forgotten(fresh: Fresh) {
    let store = &*fresh.store;
    for number in 0..3 {
        store.reject(&rejection(&[number])).await.expect("written");
    }
    tokio::time::sleep(Duration::from_millis(5)).await;
    let batch = async |age, limit| store.forget(age, limit).await.expect("forgotten").rejections;
    assert_eq!(batch(Duration::from_secs(3600), ALL).await, 0);
    assert_eq!(
        [batch(Duration::ZERO, 2).await, batch(Duration::ZERO, 2).await, batch(Duration::ZERO, 2).await],
        [2, 1, 0]
    );
}
