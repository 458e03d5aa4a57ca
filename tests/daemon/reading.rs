//! Only the right bytes are processed: whatever happens on the way, a job ends with the digest of the object it named, or with an error.

use std::time::Duration;

use apbd::job::{Digest, ErrorCode, JobId};
use apbd::objects::ObjectClient;
use apbd::store::{JobDetail, JobState, Store};
use serde_json::{Value, json};

use crate::harness::{Daemon, Site, ended, until};
use crate::objects::client;
use crate::services::proxy::{Fault, Proxy};
use crate::services::s3::shared;

struct Reading {
    site: Site,
    daemon: Daemon,
    proxy: Proxy,
    direct: ObjectClient,
    bucket: String,
}

impl Reading {
    async fn new() -> Self {
        let server = shared();
        let proxy = Proxy::to(server.port).await;
        let bucket = format!("b-{}", JobId::random());
        let direct = client(server, server.port, &server.secret_access_key);
        direct.put(&bucket, "", "text/plain", Vec::new()).await.expect("a bucket");
        server.keep_versions(&bucket);
        let mut site = Site::new();
        site.extra = format!(
            "[[store]]\nalias = \"main\"\nendpoint = \"http://127.0.0.1:{}\"\naccess_key_id = \"{}\"\nsecret_access_key = \"{}\"\n\
             allow_http = true\nallowed = [\"{bucket}\"]\nsilence_s = 1\n",
            proxy.port(),
            server.access_key_id,
            server.secret_access_key
        );
        site.variables.insert("APBD_WORK_MAX_DOCUMENT_BYTES".to_owned(), (20 << 20).to_string());
        let daemon = site.start();
        daemon.ready().await;
        Self { site, daemon, proxy, direct, bucket }
    }

    async fn put(&self, key: &str, bytes: &[u8]) {
        self.direct.put(&self.bucket, key, "text/plain", bytes.to_vec()).await.expect("written");
    }

    async fn send(&self, key: &str, more: Value) -> JobId {
        let mut document = json!({ "uri": format!("s3://main/{}/{key}", self.bucket) });
        for (name, value) in more.as_object().expect("an object") {
            document[name] = value.clone();
        }
        let id = JobId::random();
        let body = json!({ "version": 1, "task": "summarise", "documents": [document] });
        self.site.send_raw(&self.site.publisher().await, id, &body, None).await;
        id
    }

    async fn ended(&self, store: &dyn Store, job: JobId) -> JobDetail {
        assert!(self.daemon.get("/healthz").is_some());
        ended(store, job).await
    }
}

/// Text of so many lines, each another one.
fn text(lines: usize, mark: &str) -> Vec<u8> {
    (0..lines).map(|line| format!("{mark} {line} reads on and on.\n")).collect::<String>().into_bytes()
}

fn assert_read(detail: &JobDetail, bytes: &[u8]) {
    assert_eq!(detail.summary.state, JobState::Succeeded, "{:?}", detail.summary.error);
    assert_eq!(detail.documents[0].facts.digest, Some(Digest::of_bytes(bytes)), "other bytes were read");
}

fn code(detail: &JobDetail) -> Option<ErrorCode> {
    detail.summary.error.as_ref().map(|error| error.code)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_has_the_bytes_of_its_object_over_slow_cut_and_silent_connections() {
    let reading = Reading::new().await;
    let store = reading.site.store().await;
    let bytes = text(20_000, "one");
    reading.put("a.txt", &bytes).await;
    let faults = [
        Fault::CutAfter(bytes.len() as u64 / 3),
        Fault::Delay(Duration::from_millis(20)),
        Fault::HalfOpen,
        Fault::Refuse,
    ];
    for fault in faults {
        reading.proxy.set(fault);
        let job = reading.send("a.txt", json!({})).await;
        if matches!(fault, Fault::HalfOpen | Fault::Refuse) {
            // It fails for want of the store, which is no fault of the job: it is tried again.
            until("it was tried", || async {
                let detail = store.show(job).await.expect("shown");
                detail.is_some_and(|detail| detail.attempts.iter().any(|attempt| attempt.ended_at.is_some()))
            })
            .await;
            reading.proxy.set(Fault::None);
            reading.proxy.cut();
        }
        let detail = reading.ended(&*store, job).await;
        assert_read(&detail, &bytes);
        if matches!(fault, Fault::HalfOpen | Fault::Refuse) {
            let first = detail.attempts[0].error.as_ref().map(|error| error.code);
            assert!(matches!(first, Some(ErrorCode::FetchTimedOut | ErrorCode::FetchFailed)), "{first:?}");
        }
        reading.proxy.set(Fault::None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_not_the_one_named_is_not_read() {
    let reading = Reading::new().await;
    let store = reading.site.store().await;
    let (first, second) = (text(450_000, "one"), text(450_000, "two"));
    assert!(first.len() > 9 << 20, "it is read in more than one range");
    reading.put("long.txt", &first).await;
    reading.proxy.set(Fault::Delay(Duration::from_millis(10)));
    let job = reading.send("long.txt", json!({})).await;
    until("it is being read", || async {
        let detail = store.show(job).await.expect("shown");
        detail.is_some_and(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    reading.put("long.txt", &second).await;
    reading.proxy.set(Fault::None);
    let detail = reading.ended(&*store, job).await;
    assert_eq!((detail.summary.state, code(&detail)), (JobState::Failed, Some(ErrorCode::SourceChanged)));

    let old = text(10, "old");
    reading.put("pinned.txt", &old).await;
    let request = apbd::objects::GetRequest { bucket: &reading.bucket, key: "pinned.txt", ..Default::default() };
    let head = reading.direct.head(request).await.expect("a head");
    reading.put("pinned.txt", &text(10, "new")).await;
    let by_version = reading.send("pinned.txt", json!({ "version_id": head.version_id })).await;
    assert_read(&reading.ended(&*store, by_version).await, &old);
    let by_tag = reading.send("pinned.txt", json!({ "etag": head.etag })).await;
    assert_eq!(code(&reading.ended(&*store, by_tag).await), Some(ErrorCode::SourceChanged));
    reading.put("large.txt", &vec![b'x'; (20 << 20) + 1]).await;
    let large = reading.send("large.txt", json!({})).await;
    assert_eq!(code(&reading.ended(&*store, large).await), Some(ErrorCode::DocumentTooLarge));
}
