//! The pipeline over a real store and real files, with an engine that does as the document's text says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::sleep;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use serde_json::json;
use tempfile::TempDir;

use super::events::{Event, EventSink};
use super::shutdown::{self, Shutdown};
use super::{Parts, Pipeline, Settings};
use crate::document::fetch::FileSource;
use crate::engine::{Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};
use crate::generate::StopReason;
use crate::job::retry::RetryPolicy;
use crate::job::wire::DocumentMessage;
use crate::job::{DocumentUri, ErrorCode, JobId, JobMessage, MessageLimits, Stage, Task, WorkerId};
use crate::model::chat::ChatFrame;
use crate::model::tokenizer::Tokenizer;
use crate::plan::{AttentionRequest, Capabilities, PrefillPlan};
use crate::prompt::Prompter;
use crate::store::{self, Access, Door, JobDetail, JobState, NewJob, Store, StoreUrl};

fn fixture_model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

/// Does what the first word of a document says.
struct Scripted {
    tokenizer: Tokenizer,
    calls: AtomicUsize,
    concurrency: usize,
    /// Calls that wait for as many as there can be.
    together: (Mutex<usize>, Condvar),
}

impl Engine for Scripted {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            model: "scripted".to_owned(),
            model_digest: "none".to_owned(),
            max_tokens: 4096,
            has_retaining_heads: false,
            concurrency: self.concurrency,
            device: "none".to_owned(),
            shape: None,
        }
    }

    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        request: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        let capabilities = Capabilities { has_retaining_heads: false, max_hosts: 64 };
        PrefillPlan::new(context, query, query_at, request, capabilities)
            .map_err(|error| EngineError::Input { reason: error.to_string() })
    }

    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let text = self.tokenizer.decode(&request.context[request.query_at..]).expect("tokens");
        match text.split_whitespace().next() {
            Some("panic") => panic!("as the document says"),
            Some("device") => return Err(EngineError::Device { reason: "as the document says".to_owned() }),
            Some("linger") => {
                // Far longer than any test; only a cancel ends it.
                for layer in 0..60_000 {
                    if !observer(Progress::Prefill { layers_done: layer, layers: 60_000 }) {
                        return Err(EngineError::Cancelled);
                    }
                    sleep(Duration::from_millis(1));
                }
            }
            Some("together") => {
                let (count, changed) = &self.together;
                let mut count = count.lock().expect("no panic");
                *count += 1;
                changed.notify_all();
                let alone = |count: &mut usize| *count < self.concurrency;
                let waited = changed.wait_timeout_while(count, Duration::from_secs(60), alone).expect("no panic");
                assert!(!waited.1.timed_out(), "fewer than {} at a time", self.concurrency);
            }
            Some("queue") => {
                while observer(Progress::Waiting) {
                    sleep(Duration::from_millis(1));
                }
                return Err(EngineError::Cancelled);
            }
            _ => {}
        }
        let plan = self.plan(request.context.len(), request.query.len(), request.query_at, &request.attention)?;
        let (prefill, generate) = (Duration::from_millis(2), Duration::from_millis(1));
        let text = match &request.generation.schema {
            Some(_) => r#"{"owner": "A\u0000da"}"#.to_owned(),
            None => format!(" read: {text}\0"),
        };
        Ok(InferOutcome { tokens: vec![7], text, stop: StopReason::EndOfText, plan, prefill, generate })
    }
}

struct Silent;

impl EventSink for Silent {
    fn event(&self, _event: Event<'_>) {}
}

/// A folder with a database and documents, and the jobs made of them.
struct Bench {
    folder: TempDir,
    store: Arc<dyn Store>,
    engine: Arc<Scripted>,
    jobs: Vec<JobId>,
}

impl Bench {
    async fn new() -> Self {
        Self::with_concurrency(1).await
    }

    async fn with_concurrency(concurrency: usize) -> Self {
        let folder = TempDir::new().expect("a temporary directory");
        let url = StoreUrl::Sqlite(folder.path().join("test.db"));
        let store = store::open(&url, Access::Worker, RetryPolicy::local()).await.expect("opens");
        let tokenizer = Tokenizer::load(&fixture_model()).expect("the fixture model");
        let together = (Mutex::new(0), Condvar::new());
        let engine = Scripted { tokenizer, calls: AtomicUsize::new(0), concurrency, together };
        Self { folder, store, engine: Arc::new(engine), jobs: Vec::new() }
    }

    /// A job over a document with this text.
    async fn add(&mut self, text: &str) -> JobId {
        self.add_with(text, |_| {}).await
    }

    async fn add_with(&mut self, text: &str, change: impl FnOnce(&mut JobMessage)) -> JobId {
        let path = self.folder.path().join(format!("{}.txt", self.jobs.len()));
        fs::write(&path, text).expect("written");
        let uri = DocumentUri::from_path(&path).expect("an absolute path").to_string();
        let mut message = JobMessage::new(Task::Summarise, vec![DocumentMessage { uri, ..DocumentMessage::default() }]);
        change(&mut message);
        let job = message.check(Some(JobId::random()), &MessageLimits::default()).expect("valid");
        let id = job.id;
        let new = NewJob { job, door: Door::Files, origin: path.display().to_string(), size_bytes: None, reply: None };
        self.store.enqueue(&[new]).await.expect("enqueued");
        self.jobs.push(id);
        id
    }

    fn pipeline(&self, grace: Duration) -> Pipeline {
        let tokenizer = Tokenizer::load(&fixture_model()).expect("the fixture model");
        let frame = ChatFrame::load(&fixture_model()).expect("the fixture model");
        let parts = Parts {
            store: self.store.clone(),
            documents: Arc::new(FileSource),
            prompter: Arc::new(Prompter::new(tokenizer, &frame).expect("tokens")),
            engine: self.engine.clone(),
            events: Arc::new(Silent),
        };
        let wait = crate::job::retry::Backoff { first: Duration::from_millis(1), cap: Duration::from_millis(2) };
        let retry = RetryPolicy { max_attempts: 3, infra: wait, gpu: wait, internal: wait, ..RetryPolicy::local() };
        let settings = Settings {
            worker: WorkerId::unique("test", 1),
            lease: Duration::from_millis(300),
            ahead: 1,
            poll: Duration::from_millis(5),
            only: Some(self.jobs.clone()),
            models: Vec::new(),
            claim_at_most_bytes: None,
            documents_at_most_bytes: 1 << 20,
            retry,
            grace,
        };
        Pipeline::new(parts, settings)
    }

    async fn run(&self) {
        let (_handle, shutdown) = shutdown::channel();
        self.run_until(shutdown).await;
    }

    async fn run_until(&self, shutdown: Shutdown) {
        self.run_until_with_grace(shutdown, Duration::from_millis(50)).await;
    }

    async fn run_until_with_grace(&self, shutdown: Shutdown, grace: Duration) {
        self.pipeline(grace).run(shutdown).await.expect("the store and the engine's thread are there");
    }

    async fn detail(&self, job: JobId) -> JobDetail {
        self.store.show(job).await.expect("shown").expect("there")
    }

    async fn error(&self, job: JobId) -> (JobState, ErrorCode) {
        let summary = self.detail(job).await.summary;
        (summary.state, summary.error.expect("an error").code)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_becomes_a_result_with_the_time_of_every_stage() {
    let mut bench = Bench::new().await;
    let job = bench.add("the words of the document").await;
    bench.run().await;
    let detail = bench.detail(job).await;
    let result = detail.result.expect("a result");
    assert_eq!(result.text, "read: the words of the document");
    assert!(result.flags.text_cleaned, "the engine's text had a NUL in it");
    for stage in Stage::ALL {
        assert!(detail.attempts[0].stages.get(stage).is_some(), "{stage:?}");
    }
    assert_eq!(detail.documents[0].facts.media_type.as_deref(), Some("text/plain"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_removed_from_an_extraction_is_flagged() {
    let mut bench = Bench::new().await;
    let extracts = |message: &mut JobMessage| {
        (message.task, message.schema) = (Task::Extract, Some(json!({ "type": "object" })));
    };
    let job = bench.add_with("words", extracts).await;
    bench.run().await;
    let result = bench.detail(job).await.result.expect("a result");
    assert_eq!(result.extraction, Some(json!({ "owner": "Ada" })));
    assert!(result.flags.text_cleaned && !result.flags.schema_failed, "an escape of the engine's JSON was a NUL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_breaks_the_engine_is_quarantined_and_its_neighbours_succeed() {
    let mut bench = Bench::new().await;
    let mut good = Vec::new();
    let (panics, breaks) = (bench.add("panic").await, bench.add("device").await);
    for i in 0..5 {
        good.push(bench.add(&format!("document {i}")).await);
    }
    bench.run().await;
    assert_eq!(bench.error(panics).await, (JobState::Dead, ErrorCode::Internal));
    assert_eq!(bench.error(breaks).await, (JobState::Dead, ErrorCode::DeviceFailed));
    assert_eq!(bench.detail(panics).await.attempts.len(), 3);
    for job in good {
        assert_eq!(bench.detail(job).await.summary.state, JobState::Succeeded);
    }
    assert_eq!(bench.engine.calls.load(Ordering::SeqCst), 3 + 3 + 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_stops_within_a_heartbeat() {
    let mut bench = Bench::new().await;
    let job = bench.add("linger").await;
    let store = bench.store.clone();
    let cancel = tokio::spawn(async move {
        while store.show(job).await.expect("shown").expect("there").summary.state != JobState::Running {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        store.cancel(job).await.expect("asked")
    });
    bench.run().await;
    cancel.await.expect("joined");
    assert_eq!(bench.error(job).await, (JobState::Cancelled, ErrorCode::Cancelled));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_stops_a_job_in_the_engine() {
    let mut bench = Bench::new().await;
    let deadline = Utc::now() + TimeDelta::milliseconds(400);
    let job = bench.add_with("linger", |message| message.deadline = Some(deadline)).await;
    bench.run().await;
    assert_eq!(bench.error(job).await, (JobState::Failed, ErrorCode::DeadlineExceeded));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_hands_back_what_is_unfinished_and_spends_no_attempt() {
    let mut bench = Bench::new().await;
    let (lingering, waiting) = (bench.add("linger").await, bench.add("words").await);
    let (handle, shutdown) = shutdown::channel();
    let engine = bench.engine.clone();
    let stop = tokio::spawn(async move {
        while engine.calls.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        handle.advance();
        handle
    });
    bench.run_until(shutdown).await;
    stop.await.expect("joined");
    for job in [lingering, waiting] {
        let detail = bench.detail(job).await;
        assert_eq!((detail.summary.state, detail.failures.suspect, detail.failures.infra), (JobState::Queued, 0, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_are_in_the_engine_as_it_takes_and_each_is_its_own_job() {
    let mut bench = Bench::with_concurrency(3).await;
    let mut jobs = Vec::new();
    for i in 0..3 {
        jobs.push(bench.add(&format!("together {i}")).await);
    }
    bench.run().await;
    let mut texts = BTreeSet::new();
    for job in jobs {
        let detail = bench.detail(job).await;
        assert_eq!((detail.summary.state, detail.attempts.len()), (JobState::Succeeded, 1));
        texts.insert(detail.result.expect("a result").text);
    }
    assert_eq!(texts, (0..3).map(|i| format!("read: together {i}")).collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_within_the_engine_is_handed_back_when_the_drain_begins() {
    let mut bench = Bench::with_concurrency(2).await;
    let (lingers, waits) = (bench.add("linger").await, bench.add("queue").await);
    let (handle, shutdown) = shutdown::channel();
    let (engine, store) = (bench.engine.clone(), bench.store.clone());
    let stop = tokio::spawn(async move {
        while engine.calls.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        handle.advance();
        // One that only waits has no grace; the other has.
        let queued =
            async |job| store.show(job).await.expect("shown").expect("there").summary.state == JobState::Queued;
        while !queued(waits).await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (handle, queued(lingers).await)
    });
    bench.run_until_with_grace(shutdown, Duration::from_secs(3)).await;
    let (_handle, both) = stop.await.expect("joined");
    assert!(!both, "what was begun goes on for its grace");
    for job in [lingers, waits] {
        let detail = bench.detail(job).await;
        assert_eq!((detail.summary.state, detail.failures.suspect), (JobState::Queued, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_fails_or_is_cut_as_the_job_says() {
    let mut bench = Bench::new().await;
    let words = "many words ".repeat(6000);
    let fails = bench.add(&words).await;
    let cut = bench.add_with(&words, |message| message.overflow = Some(crate::job::Overflow::TruncateMiddle)).await;
    bench.run().await;
    assert_eq!(bench.error(fails).await, (JobState::Failed, ErrorCode::ContextTooLong));
    let result = bench.detail(cut).await.result.expect("a result");
    assert!(result.flags.input_truncated && result.text.contains("tokens left out"));
}
