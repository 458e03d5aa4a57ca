//! What every store has to do.

use std::sync::Arc;
use std::time::Duration;

use apbd::generate::StopReason;
use apbd::job::retry::{FailureCounter, RetryPolicy, Verdict};
use apbd::job::wire::DocumentMessage;
use apbd::job::{
    Attempt, Digest, DocumentFacts, ErrorCode, JobError, JobId, JobMessage, JobResult, MessageLimits, OverflowHandling,
    ResultFlags, Stage, StageTimes, Task, TokenCount, WorkerId,
};
use apbd::plan::{AttentionMode, Execution, Host, PrefillPlan, Selector};
use apbd::store::{
    AttemptReport, Beat, CancelOutcome, Claim, ClaimRequest, Door, Ending, Enqueued, JobFilter, JobProgress, JobState,
    Lease, LeaseState, NewJob, Rejection, Replay, Reply, ReportView, Store,
};
use chrono::{TimeDelta, Utc};
use serde_json::json;

/// An empty store, and what has to live as long as it does.
pub struct Fresh {
    pub store: Arc<dyn Store>,
    pub _keep: Box<dyn Send>,
}

const LEASE: Duration = Duration::from_secs(60);

/// Waits are short here, and three suspect failures are the end.
pub fn policy() -> RetryPolicy {
    RetryPolicy { max_attempts: 3, ..RetryPolicy::local() }
}

pub fn message(uri: &str) -> JobMessage {
    JobMessage::new(Task::Summarise, vec![DocumentMessage { uri: uri.to_owned(), ..DocumentMessage::default() }])
}

pub fn new_job(message: JobMessage) -> NewJob {
    let id = message.job_id.unwrap_or_else(JobId::random);
    let job = message.check(Some(id), &MessageLimits::default()).expect("a valid message");
    NewJob { job, door: Door::Submit, origin: "test".to_owned(), size_bytes: None, reply: None }
}

pub async fn add(store: &dyn Store, message: JobMessage) -> JobId {
    let new = new_job(message);
    assert_eq!(store.enqueue(std::slice::from_ref(&new)).await.expect("enqueued"), [Enqueued::Inserted]);
    new.job.id
}

pub fn request(limit: u32) -> ClaimRequest {
    let worker = WorkerId::unique("test", 1);
    ClaimRequest { worker, limit, lease: LEASE, models: Vec::new(), max_bytes: None, only: None }
}

pub async fn claim(store: &dyn Store, limit: u32) -> Vec<Claim> {
    store.claim(&request(limit)).await.expect("claimed")
}

fn result(text: &str) -> JobResult {
    let host = Host { local: 0..100, excluded: 0, compressed: 0, kept: None };
    let plan = PrefillPlan {
        mode: AttentionMode::Full,
        context: 100,
        query: 10,
        hosts: vec![host],
        anchor: None,
        selector: Selector::None,
        exact: true,
        execution: Execution::default(),
        notes: vec!["a note".to_owned()],
    };
    let flags =
        ResultFlags { output_truncated: true, overflow: OverflowHandling::TruncateMiddle, ..ResultFlags::default() };
    JobResult {
        text: text.to_owned(),
        extraction: Some(json!({ "owner": "Ada" })),
        tokens_in: TokenCount(110),
        tokens_out: TokenCount(5),
        stop: StopReason::Length,
        model: "tiny".to_owned(),
        model_digest: "abc".to_owned(),
        device: "cpu".to_owned(),
        plan,
        flags,
    }
}

fn report(ending: Ending) -> AttemptReport {
    let mut stages = StageTimes::default();
    stages.add(Stage::Prefill, Duration::from_millis(1500));
    let facts = DocumentFacts {
        bytes: Some(7),
        digest: Some(Digest::of_bytes(b"content")),
        tokens: Some(TokenCount(100)),
        ..DocumentFacts::default()
    };
    AttemptReport { ending, stages, documents: vec![facts] }
}

pub fn succeeded() -> AttemptReport {
    report(Ending::Succeeded(Box::new(result("done"))))
}

pub fn errored(code: ErrorCode, verdict: Verdict) -> AttemptReport {
    report(Ending::Errored { error: JobError::new(code, "as the test says"), verdict })
}

/// Of a message with these bytes.
pub fn rejection(bytes: &[u8]) -> Rejection {
    Rejection {
        door: Door::Amqp,
        origin: "jobs".to_owned(),
        message_id: None,
        job_id: None,
        code: ErrorCode::MessageInvalid,
        reason: "no JSON".to_owned(),
        digest: Digest::of_bytes(bytes),
        size_bytes: bytes.len() as u64,
    }
}

pub async fn state(store: &dyn Store, job: JobId) -> JobState {
    store.show(job).await.expect("shown").expect("there").summary.state
}

pub async fn enqueueing_twice_is_enqueueing_once(fresh: Fresh) {
    let store = &*fresh.store;
    let first = new_job(message("file:///a"));
    let other =
        NewJob { job: new_job(JobMessage { job_id: Some(first.job.id), ..message("file:///b") }).job, ..first.clone() };
    let answers = store.enqueue(&[first.clone(), first.clone(), other.clone()]).await.expect("enqueued");
    assert_eq!(answers, [Enqueued::Inserted, Enqueued::Duplicate { state: JobState::Queued }, Enqueued::Conflict]);
    assert_eq!(store.enqueue(&[other]).await.expect("enqueued"), [Enqueued::Conflict]);
    for (door, queued) in [(None, 1), (Some(first.door), 1), (Some(Door::Amqp), 0)] {
        assert_eq!(store.inbox_depth(door, 10).await.expect("counted").queued, queued, "{door:?}");
    }
    let claimed = claim(store, 10).await;
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].job, first.job, "what comes out is what went in");
}

pub async fn claims_follow_priority_deadline_size_and_age(fresh: Fresh) {
    let store = &*fresh.store;
    let soon = Some(Utc::now() + TimeDelta::hours(1));
    let jobs = [
        ("old", None, None, None),
        ("small", None, None, Some(10)),
        ("large", None, None, Some(1000)),
        ("due", None, soon, None),
        ("urgent", Some(9), None, Some(5000)),
        ("lazy", Some(0), soon, Some(1)),
    ];
    for (name, priority, deadline, size_bytes) in jobs {
        let message = JobMessage { priority, deadline, ..message(&format!("file:///{name}")) };
        store.enqueue(&[NewJob { size_bytes, ..new_job(message) }]).await.expect("enqueued");
    }
    let mut order = Vec::new();
    while let Some(next) = claim(store, 1).await.pop() {
        order.push(next.job.documents[0].uri.to_string().replace("file:///", ""));
    }
    assert_eq!(order, ["urgent", "due", "small", "large", "old", "lazy"]);
}

pub async fn two_claims_never_return_the_same_job(fresh: Fresh) {
    for i in 0..40 {
        add(&*fresh.store, message(&format!("file:///{i}"))).await;
    }
    let claimers: Vec<_> = (0..8)
        .map(|_| {
            let store = Arc::clone(&fresh.store);
            tokio::spawn(async move {
                let mut ids = Vec::new();
                loop {
                    let claims = claim(&*store, 3).await;
                    if claims.is_empty() {
                        return ids;
                    }
                    ids.extend(claims.into_iter().map(|claim| claim.job.id));
                }
            })
        })
        .collect();
    let mut all = Vec::new();
    for claimer in claimers {
        all.extend(claimer.await.expect("joined"));
    }
    let claimed = all.len();
    all.sort();
    all.dedup();
    assert_eq!((claimed, all.len()), (40, 40));
}

pub async fn a_claim_takes_only_what_its_worker_serves(fresh: Fresh) {
    let store = &*fresh.store;
    let other = add(store, JobMessage { model: Some("other".to_owned()), ..message("file:///a") }).await;
    let any = add(store, message("file:///b")).await;
    let large = NewJob { size_bytes: Some(1 << 40), ..new_job(message("file:///c")) };
    store.enqueue(&[large]).await.expect("enqueued");
    let mine = ClaimRequest { models: vec!["mine".to_owned()], max_bytes: Some(1 << 20), ..request(10) };
    let claims = store.claim(&mine).await.expect("claimed");
    assert_eq!(claims.iter().map(|claim| claim.job.id).collect::<Vec<_>>(), [any]);
    let only = ClaimRequest { only: Some(vec![other]), ..request(10) };
    let claims = store.claim(&only).await.expect("claimed");
    assert_eq!(claims.iter().map(|claim| claim.job.id).collect::<Vec<_>>(), [other]);
}

pub async fn a_result_is_stored_with_its_timing_and_shown(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, message("file:///a")).await;
    let lease = claim(store, 1).await[0].lease();
    assert!(store.finish(&lease, &succeeded()).await.expect("finished"));
    let detail = store.show(job).await.expect("shown").expect("there");
    assert_eq!(detail.summary.state, JobState::Succeeded);
    assert_eq!(detail.result, Some(result("done")));
    assert_eq!(detail.attempts.len(), 1);
    assert_eq!(detail.attempts[0].outcome, "succeeded");
    assert_eq!(detail.attempts[0].stages.get(Stage::Prefill), Some(Duration::from_millis(1500)));
    assert_eq!(detail.documents[0].facts.digest, Some(Digest::of_bytes(b"content")));
    assert!(!store.finish(&lease, &succeeded()).await.expect("asked"), "an attempt ends once");
    assert_eq!(store.show(JobId::random()).await.expect("asked"), None);
}

pub async fn a_stale_attempt_changes_nothing(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, message("file:///a")).await;
    let short = ClaimRequest { lease: Duration::ZERO, ..request(1) };
    let stale = store.claim(&short).await.expect("claimed")[0].lease();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(store.sweep().await.expect("swept").requeued, 1);
    let lost = store.heartbeat(&short.worker, LEASE, &[Beat { lease: stale, progress: None }]).await.expect("answered");
    assert_eq!(lost, [LeaseState::Lost]);
    assert!(!store.finish(&stale, &succeeded()).await.expect("answered"));
    assert_eq!(state(store, job).await, JobState::Queued);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let fresh_claim = claim(store, 1).await;
    assert_eq!(fresh_claim[0].job.id, job);
    assert!(!store.finish(&stale, &succeeded()).await.expect("answered"), "another attempt holds it");
    assert!(store.finish(&fresh_claim[0].lease(), &succeeded()).await.expect("finished"));
}

pub async fn an_expired_lease_is_swept_and_counted(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, message("file:///a")).await;
    let asked = request(1);
    let lease = store.claim(&asked).await.expect("claimed")[0].lease();
    let progress = JobProgress { stage: Stage::Prefill, done: 3, total: 8 };
    let beat = [Beat { lease, progress: Some(progress) }];
    let held = store.heartbeat(&asked.worker, Duration::ZERO, &beat).await.expect("answered");
    assert_eq!(held, [LeaseState::Held]);
    assert_eq!(store.show(job).await.expect("shown").expect("there").summary.progress, Some(progress));
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(store.sweep().await.expect("swept").requeued, 1);
    let detail = store.show(job).await.expect("shown").expect("there");
    assert_eq!((detail.summary.state, detail.failures.suspect, detail.failures.infra), (JobState::Queued, 1, 0));
    assert_eq!(detail.attempts[0].outcome, "lost");
    assert_eq!(detail.summary.error.expect("a reason").code, ErrorCode::WorkerDied);
}

pub async fn a_job_that_kills_its_workers_is_quarantined(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, message("file:///poison")).await;
    for round in 1..=3 {
        let claims = store.claim(&ClaimRequest { lease: Duration::ZERO, ..request(1) }).await.expect("claimed");
        assert_eq!(claims.len(), 1, "round {round}");
        tokio::time::sleep(Duration::from_millis(5)).await;
        let swept = store.sweep().await.expect("swept");
        assert_eq!((swept.requeued, swept.quarantined), if round < 3 { (1, 0) } else { (0, 1) });
        // The wait before the next attempt.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(state(store, job).await, JobState::Dead);
}

pub async fn failures_of_the_surroundings_are_counted_apart(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, message("file:///a")).await;
    let lease = claim(store, 1).await[0].lease();
    let verdict = Verdict::Retry { after: Duration::from_millis(150), counter: FailureCounter::Infra };
    assert!(store.finish(&lease, &errored(ErrorCode::FetchFailed, verdict)).await.expect("finished"));
    assert!(claim(store, 1).await.is_empty(), "it waits");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let again = claim(store, 1).await;
    assert_eq!((again[0].failures.suspect, again[0].failures.infra), (0, 1));
    let lease = again[0].lease();
    assert!(store.finish(&lease, &errored(ErrorCode::DocumentNotFound, Verdict::Fail)).await.expect("finished"));
    let summary = store.show(job).await.expect("shown").expect("there").summary;
    assert_eq!((summary.state, summary.error.expect("a reason").code), (JobState::Failed, ErrorCode::DocumentNotFound));
}

pub async fn a_requeued_job_spent_nothing(fresh: Fresh) {
    let store = &*fresh.store;
    add(store, message("file:///a")).await;
    let lease = claim(store, 1).await[0].lease();
    let handed_back = errored(ErrorCode::Shutdown, Verdict::Requeue { after: Duration::ZERO });
    assert!(store.finish(&lease, &handed_back).await.expect("finished"));
    let again = claim(store, 1).await;
    assert_eq!((again[0].failures.suspect, again[0].failures.infra), (0, 0));
    assert_eq!(again[0].attempt.get(), 2);
}

pub async fn a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked(fresh: Fresh) {
    let store = &*fresh.store;
    let (queued, running) = (
        add(store, message("file:///b")).await,
        add(store, JobMessage { priority: Some(9), ..message("file:///a") }).await,
    );
    let asked = request(1);
    let lease = store.claim(&asked).await.expect("claimed")[0].lease();
    assert_eq!(store.cancel(queued).await.expect("cancelled"), CancelOutcome::Cancelled);
    assert_eq!(store.cancel(queued).await.expect("asked"), CancelOutcome::AlreadyFinal(JobState::Cancelled));
    assert!(store.cancels(&[lease]).await.expect("answered").is_empty(), "nobody asked yet");
    assert_eq!(store.cancel(running).await.expect("asked"), CancelOutcome::Requested);
    let former = Lease { attempt: Attempt::new(0), ..lease };
    assert_eq!(store.cancels(&[former, lease]).await.expect("answered"), [lease], "another attempt is not meant");
    assert_eq!(store.cancel(JobId::random()).await.expect("asked"), CancelOutcome::NotFound);
    let told = store.heartbeat(&asked.worker, LEASE, &[Beat { lease, progress: None }]).await.expect("answered");
    assert_eq!(told, [LeaseState::CancelRequested]);
    // Even if its worker would rather try it again.
    let verdict = Verdict::Requeue { after: Duration::ZERO };
    assert!(store.finish(&lease, &errored(ErrorCode::Shutdown, verdict)).await.expect("finished"));
    assert_eq!(state(store, running).await, JobState::Cancelled);
    assert!(claim(store, 5).await.is_empty());
}

pub async fn a_deadline_that_passed_fails_a_waiting_job(fresh: Fresh) {
    let store = &*fresh.store;
    let deadline = Some(Utc::now() + TimeDelta::milliseconds(100));
    let job = add(store, JobMessage { deadline, ..message("file:///a") }).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(claim(store, 1).await.is_empty());
    assert_eq!(store.sweep().await.expect("swept").expired, 1);
    let summary = store.show(job).await.expect("shown").expect("there").summary;
    assert_eq!((summary.state, summary.error.expect("a reason").code), (JobState::Failed, ErrorCode::DeadlineExceeded));
}

pub async fn completion_events_stay_until_they_are_confirmed(fresh: Fresh) {
    let store = &*fresh.store;
    let reply = Reply { target: "replies".to_owned(), correlation_id: Some("mine".to_owned()) };
    let asked = NewJob { reply: Some(reply.clone()), ..new_job(message("file:///a")) };
    store.enqueue(std::slice::from_ref(&asked)).await.expect("enqueued");
    add(store, message("file:///no-reply")).await;
    for claim in claim(store, 2).await {
        assert!(store.finish(&claim.lease(), &succeeded()).await.expect("finished"));
    }
    let taken = store.outbox_take(10, Duration::from_millis(50)).await.expect("taken");
    assert_eq!(taken.len(), 1, "one job wanted to be told");
    assert_eq!((taken[0].job, &taken[0].reply, taken[0].tries), (asked.job.id, &reply, 0));
    assert_eq!(taken[0].body["text"], "done");
    assert!(store.outbox_take(10, LEASE).await.expect("taken").is_empty(), "it is hidden while somebody sends it");
    tokio::time::sleep(Duration::from_millis(80)).await;
    let again = store.outbox_take(10, LEASE).await.expect("taken");
    assert_eq!((again[0].event_id, again[0].tries), (taken[0].event_id, 1));
    store.outbox_return(taken[0].event_id, "no route", Some(Duration::ZERO)).await.expect("returned");
    assert_eq!(store.outbox_take(10, LEASE).await.expect("taken").len(), 1);
    store.outbox_confirm(&[taken[0].event_id]).await.expect("confirmed");
    store.outbox_return(taken[0].event_id, "too late", None).await.expect("nothing to return");
    assert!(store.outbox_take(10, LEASE).await.expect("taken").is_empty());
}

pub async fn dead_jobs_are_replayed_with_clean_counters(fresh: Fresh) {
    let store = &*fresh.store;
    let (dead, failed) = (add(store, message("file:///a")).await, add(store, message("file:///b")).await);
    for claim in claim(store, 2).await {
        let verdict = if claim.job.id == dead { Verdict::Quarantine } else { Verdict::Fail };
        store.finish(&claim.lease(), &errored(ErrorCode::EngineCrashed, verdict)).await.expect("finished");
    }
    assert_eq!((state(store, dead).await, state(store, failed).await), (JobState::Dead, JobState::Failed));
    assert_eq!(store.replay(&Replay::Dead).await.expect("replayed"), 1);
    let again = claim(store, 5).await;
    assert_eq!(again.iter().map(|claim| (claim.job.id, claim.failures.suspect)).collect::<Vec<_>>(), [(dead, 0)]);
    assert_eq!(
        store.replay(&Replay::Jobs(vec![failed, dead])).await.expect("replayed"),
        1,
        "a running job is left alone"
    );
    assert_eq!(state(store, failed).await, JobState::Queued);
}

pub async fn a_rejection_is_written_once(fresh: Fresh) {
    let store = &*fresh.store;
    let rejection = rejection(b"{");
    let same_bytes = Rejection { message_id: Some("other".to_owned()), ..rejection.clone() };
    for rejection in [&rejection, &rejection, &same_bytes, &same_bytes] {
        store.reject(rejection).await.expect("written");
    }
    let failures = store.report(ReportView::Failures, 10).await.expect("reported");
    assert_eq!(failures.rows.len(), 1);
    let count = failures.columns.iter().position(|column| column == "count").expect("a count");
    assert_eq!(failures.rows[0][count], 2, "the same bytes under another id are another message");
}

pub async fn lists_and_reports_show_what_is_there(fresh: Fresh) {
    let store = &*fresh.store;
    for view in ReportView::ALL {
        let empty = store.report(view, 5).await.expect("reported");
        assert!(!empty.columns.is_empty() && empty.rows.is_empty(), "{view:?}: {empty:?}");
    }
    for i in 0..4 {
        add(store, message(&format!("file:///{i}"))).await;
    }
    let claims = claim(store, 2).await;
    store.finish(&claims[0].lease(), &succeeded()).await.expect("finished");
    let list =
        async |states: Vec<JobState>| store.list(&JobFilter { states, only: None, limit: 10 }).await.expect("listed");
    assert_eq!(list(vec![]).await.len(), 4);
    assert_eq!(list(vec![JobState::Running, JobState::Succeeded]).await.len(), 2);
    let only = JobFilter { states: vec![], only: Some(vec![claims[1].job.id]), limit: 10 };
    assert_eq!(store.list(&only).await.expect("listed")[0].state, JobState::Running);
    for view in
        [ReportView::Jobs, ReportView::ThroughputHourly, ReportView::Latency, ReportView::Tokens, ReportView::Backlog]
    {
        let table = store.report(view, 5).await.expect("reported");
        assert!(!table.rows.is_empty(), "{view:?}");
        assert!(table.rows.iter().all(|row| row.len() == table.columns.len()), "{view:?}");
    }
}

pub async fn text_that_no_database_holds_is_cleaned_and_flagged(fresh: Fresh) {
    let store = &*fresh.store;
    let job = add(store, JobMessage { instruction: Some("a\0b".to_owned()), ..message("file:///a") }).await;
    let held = claim(store, 1).await.remove(0);
    assert_eq!(held.job.instruction.as_deref(), Some("ab"));
    let dirty = JobResult { extraction: Some(json!({ "own\0er": ["A\0da"] })), ..result("do\0ne") };
    let report = report(Ending::Succeeded(Box::new(dirty)));
    assert!(store.finish(&held.lease(), &report).await.expect("finished"));
    let stored = store.show(job).await.expect("shown").expect("there").result.expect("a result");
    assert_eq!((stored.text.as_str(), stored.extraction), ("done", Some(json!({ "owner": ["Ada"] }))));
    assert!(stored.flags.text_cleaned);
}

pub async fn latency_is_reported_by_stage(fresh: Fresh) {
    let store = &*fresh.store;
    for i in 1..=100 {
        add(store, message(&format!("file:///{i}"))).await;
        let lease = claim(store, 1).await[0].lease();
        let mut stages = StageTimes::default();
        stages.add(Stage::Prefill, Duration::from_millis(i * 10));
        let ending = Ending::Succeeded(Box::new(result("done")));
        let report = AttemptReport { ending, stages, documents: Vec::new() };
        assert!(store.finish(&lease, &report).await.expect("finished"));
    }
    let latency = store.report(ReportView::Latency, 50).await.expect("reported");
    let column = |name: &str| latency.columns.iter().position(|column| column == name).expect("a column");
    assert_eq!(latency.rows.len(), 1, "one stage was reached: {:?}", latency.rows);
    let row = &latency.rows[0];
    assert_eq!((&row[column("stage")], &row[column("model")]), (&json!("prefill"), &json!("tiny")));
    assert_eq!(row[column("attempts")], 100);
    for (name, expected) in [("p50_ms", 500.0), ("p95_ms", 950.0), ("p99_ms", 990.0)] {
        let ms = row[column(name)].as_f64().expect("a number");
        assert!((ms / expected - 1.0).abs() < 0.011, "{name} is {ms}");
    }
}

/// One job from its door to its result.
pub async fn finish_one(store: &dyn Store) {
    add(store, message("file:///a")).await;
    let lease = claim(store, 1).await[0].lease();
    assert!(store.finish(&lease, &succeeded()).await.expect("finished"));
    store.sweep().await.expect("swept");
}
