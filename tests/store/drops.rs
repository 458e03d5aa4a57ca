//! What drop folders remember, and results on their way to files: the same on both stores.

use std::time::Duration;

use apbd::job::Digest;
use apbd::job::retry::Verdict;
use apbd::job::{ErrorCode, JobError, StageTimes};
use apbd::store::{AttemptReport, DropFate, DropMark, DropSighting, Ending, JobState, ReadyFiles};

use crate::suite::{Fresh, add, claim, message};

const PLACE: &str = "s3://main/b/drop/";

fn sighting(name: &str, version: &str) -> DropSighting {
    let document = name.strip_suffix(".job.json").unwrap_or(name);
    DropSighting {
        file: Digest::of_bytes(document.as_bytes()),
        is_sidecar: document != name,
        uri: format!("{PLACE}{name}"),
        version: version.to_owned(),
        etag: Some(version.to_owned()),
        size_bytes: 3,
        fault: None,
    }
}

fn ready(settle: Duration, with_sidecar: bool) -> ReadyFiles {
    ReadyFiles { settle, with_sidecar, after: None, limit: 100 }
}

async fn names(fresh: &Fresh, which: &ReadyFiles) -> Vec<String> {
    let files = fresh.store.drop_ready(PLACE, which).await.expect("asked");
    let mut names: Vec<_> = files.iter().map(|file| file.uri.trim_start_matches(PLACE).to_owned()).collect();
    names.sort();
    names
}

pub async fn a_file_is_ready_when_it_was_seen_unchanged(fresh: Fresh) {
    let (store, settle) = (&fresh.store, Duration::from_millis(300));
    let seen = async |files: &[DropSighting]| store.drop_seen(PLACE, files).await.expect("remembered");
    seen(&[sighting("a", "1"), sighting("b", "1"), sighting("b", "1")]).await;
    assert_eq!(names(&fresh, &ready(Duration::ZERO, false)).await, ["a", "b"]);
    tokio::time::sleep(settle + Duration::from_millis(50)).await;
    assert!(names(&fresh, &ready(settle, false)).await.is_empty(), "time alone is not enough");
    seen(&[sighting("a", "1"), sighting("b", "2")]).await;
    assert_eq!(names(&fresh, &ready(settle, false)).await, ["a"], "another version begins anew");
    let elsewhere = store.drop_ready("s3://main/b/other/", &ready(Duration::ZERO, false)).await.expect("asked");
    assert!(elsewhere.is_empty());
    let first = ReadyFiles { limit: 1, ..ready(Duration::ZERO, false) };
    let page = store.drop_ready(PLACE, &first).await.expect("asked");
    let next = ReadyFiles { after: Some(page[0].file), ..first };
    let rest = store.drop_ready(PLACE, &next).await.expect("asked");
    assert_eq!((page.len(), rest.len()), (1, 1));
    assert_ne!(page[0], rest[0]);
}

pub async fn a_sidecar_is_found_beside_its_document(fresh: Fresh) {
    let files = [sighting("a", "1"), sighting("a.job.json", "1"), sighting("b", "1"), sighting("c.job.json", "1")];
    fresh.store.drop_seen(PLACE, &files).await.expect("remembered");
    let all = fresh.store.drop_ready(PLACE, &ready(Duration::ZERO, false)).await.expect("asked");
    let sidecars: Vec<_> = all.iter().filter_map(|file| file.sidecar.as_deref()).collect();
    assert_eq!((all.len(), sidecars), (2, vec!["s3://main/b/drop/a.job.json"]));
    assert_eq!(names(&fresh, &ready(Duration::ZERO, true)).await, ["a"]);
}

pub async fn a_file_is_disposed_of_when_its_job_has_ended(fresh: Fresh) {
    let store = &fresh.store;
    let job = add(&**store, message("s3://main/b/drop/a")).await;
    let (a, b) = (sighting("a", "1"), sighting("b", "1"));
    store.drop_seen(PLACE, &[a.clone(), b.clone()]).await.expect("remembered");
    let mark = |of: &DropSighting, version: &str, fate| DropMark { file: of.file, version: version.to_owned(), fate };
    let marks = [mark(&a, "1", DropFate::Taken(job)), mark(&b, "0", DropFate::Rejected)];
    store.drop_mark(PLACE, &marks).await.expect("marked");
    assert_eq!(names(&fresh, &ready(Duration::ZERO, false)).await, ["b"], "another version is not marked");
    store.drop_mark(PLACE, &[mark(&b, "1", DropFate::Rejected)]).await.expect("marked");
    let ended = async || {
        let ended = store.drop_ended(PLACE, None, 10).await.expect("asked");
        ended.iter().map(|ended| ended.state).collect::<Vec<_>>()
    };
    assert_eq!(ended().await, [None], "the job has not ended");
    end(&fresh).await;
    let mut both = ended().await;
    both.sort_by_key(Option::is_some);
    assert_eq!(both, [None, Some(JobState::Failed)]);
    let fates = [mark(&a, "1", DropFate::Disposed(None)), mark(&b, "1", DropFate::Disposed(Some("why".to_owned())))];
    store.drop_mark(PLACE, &fates).await.expect("marked");
    assert!(ended().await.is_empty());
    store.drop_seen(PLACE, &[sighting("a", "1"), sighting("b", "2")]).await.expect("remembered");
    assert_eq!(names(&fresh, &ready(Duration::ZERO, false)).await, ["b"], "a new version is a new file");
    assert_eq!(store.drop_forget(PLACE, Duration::from_secs(60)).await.expect("forgotten"), 0);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(store.drop_forget(PLACE, Duration::from_millis(1)).await.expect("forgotten"), 2);
}

/// Fails the one job there is.
async fn end(fresh: &Fresh) {
    let claims = claim(&*fresh.store, 1).await;
    let error = JobError::new(ErrorCode::DocumentEmpty, "empty");
    let ending = Ending::Errored { error, verdict: Verdict::Fail };
    let report = AttemptReport { ending, stages: StageTimes::default(), documents: Vec::new() };
    assert!(fresh.store.finish(&claims[0].lease(), &report).await.expect("finished"));
}

pub async fn an_ended_job_is_noted_until_it_was_written(fresh: Fresh) {
    let store = &fresh.store;
    let take = async |lease| store.export_take("file:///out", 10, lease).await.expect("taken");
    add(&**store, message("s3://main/b/a")).await;
    end(&fresh).await;
    store.export_want("file:///out").await.expect("wanted");
    store.export_want("file:///out").await.expect("wanted again");
    assert!(take(Duration::ZERO).await.is_empty(), "it had ended before anybody wanted it");
    let job = add(&**store, message("s3://main/b/b")).await;
    end(&fresh).await;
    let taken = take(Duration::ZERO).await;
    assert_eq!(taken.iter().map(|export| export.job).collect::<Vec<_>>(), [job]);
    assert_eq!(take(Duration::from_secs(60)).await, taken, "what was not written is taken again");
    assert!(take(Duration::ZERO).await.is_empty(), "hidden while somebody writes it");
    store.export_done("file:///out", taken[0]).await.expect("done");
    store.export_done("file:///out", taken[0]).await.expect("done again");
}
