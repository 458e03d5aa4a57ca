//! Cancel, deadline and retry act as classified: one job of each class, and each way to stop one, from the queue to the completion event.

use apbd::intake::amqp::Publisher;
use apbd::job::{ErrorClass, ErrorCode, JobId, Stage};
use apbd::store::{JobDetail, JobState, Store};
use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};

use crate::harness::{Daemon, Site, declare, ended, message, until};
use crate::services::postgres::shared;
use crate::services::proxy::{Fault, Proxy};
use crate::services::s3;

/// A daemon on PostgreSQL, and a queue for its completion events.
struct Desk {
    site: Site,
    daemon: Daemon,
    publisher: Publisher,
    store: std::sync::Arc<dyn Store>,
    done: String,
}

impl Desk {
    async fn new(site: Site) -> Self {
        let daemon = site.start();
        daemon.ready().await;
        let (publisher, store) = (site.publisher().await, site.store().await);
        let done = format!("done-{}", JobId::random());
        declare(&publisher, &done).await;
        Self { site, daemon, publisher, store, done }
    }

    async fn send(&self, body: &Value) -> JobId {
        let job = JobId::random();
        self.site.send_raw(&self.publisher, job, body, Some(&self.done)).await;
        job
    }

    async fn shown(&self, job: JobId) -> Option<JobDetail> {
        self.store.show(job).await.expect("shown")
    }

    /// Waits until the job is in a stage of this worker's.
    async fn is_in(&self, job: JobId, stage: Stage) {
        until("the job is worked on", || async {
            let detail = self.shown(job).await;
            detail.is_some_and(|detail| detail.summary.progress.is_some_and(|progress| progress.stage == stage))
        })
        .await;
    }

    /// Waits for the job's end: the end it has to have, in the database and in its one completion event.
    async fn ends(&self, job: JobId, state: JobState, code: ErrorCode) -> JobDetail {
        let detail = ended(&*self.store, job).await;
        let error = detail.summary.error.as_ref().expect("a reason");
        assert_eq!((detail.summary.state, error.code), (state, code), "{}", error.message);
        let event: Value = serde_json::from_slice(&message(&self.publisher, &self.done).await.data).expect("JSON");
        assert_eq!((&event["job_id"], &event["state"]), (&json!(job), &json!(state)));
        assert_eq!((&event["error"]["code"], &event["error"]["class"]), (&json!(code), &json!(code.class())));
        detail
    }
}

fn reads(uri: &str) -> Value {
    json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }] })
}

/// A site whose documents in the store "main" come through `proxy`, which may keep silent for ever.
async fn site_behind(proxy: &Proxy) -> Site {
    let server = s3::shared();
    let mut site = Site::on_postgres(shared()).await;
    site.extra = format!(
        "[[store]]\nalias = \"main\"\nendpoint = \"http://127.0.0.1:{}\"\nallow_http = true\naccess_key_id = \"{}\"\n\
         secret_access_key = \"{}\"\nallowed = [\"slow\"]\nsilence_s = 600\n",
        proxy.port(),
        server.access_key_id,
        server.secret_access_key
    );
    site
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_each_class_is_retried_or_ended_as_its_class_says() {
    let proxy = Proxy::to(s3::shared().port).await;
    let mut site = site_behind(&proxy).await;
    site.variables.insert("APBD_WORK_MAX_INFRA_FAILURES".to_owned(), "2".to_owned());
    let desk = Desk::new(site).await;

    let gone = format!("file://{}", desk.site.path("documents/gone.txt").display());
    let job = desk.send(&reads(&gone)).await;
    let detail = desk.ends(job, JobState::Failed, ErrorCode::DocumentNotFound).await;
    assert_eq!((ErrorCode::DocumentNotFound.class(), detail.attempts.len()), (ErrorClass::Input, 1));

    let mut body = desk.site.lasting(1);
    body["template"] = json!("nobody@7");
    let job = desk.send(&body).await;
    let detail = desk.ends(job, JobState::Failed, ErrorCode::TemplateUnknown).await;
    assert_eq!(detail.attempts.len(), 1);

    let mut body = desk.site.lasting(1);
    body["seed"] = json!(6);
    let job = desk.send(&body).await;
    let detail = desk.ends(job, JobState::Failed, ErrorCode::ModelFailed).await;
    assert_eq!((ErrorCode::ModelFailed.class(), detail.attempts.len()), (ErrorClass::Model, 1));

    proxy.set(Fault::Refuse);
    let job = desk.send(&reads("s3://main/slow/a.txt")).await;
    let detail = desk.ends(job, JobState::Failed, ErrorCode::FetchFailed).await;
    assert_eq!((detail.attempts.len(), detail.failures.suspect, detail.failures.infra), (2, 0, 2));

    body["seed"] = json!(3);
    let job = desk.send(&body).await;
    let detail = desk.ends(job, JobState::Dead, ErrorCode::DeviceFailed).await;
    assert_eq!((detail.attempts.len(), detail.failures.suspect, detail.failures.infra), (2, 2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_worker_is_counted_by_the_next_one() {
    let mut site = Site::on_postgres(shared()).await;
    site.variables.insert("APBD_WORK_MAX_ATTEMPTS".to_owned(), "1".to_owned());
    let mut desk = Desk::new(site).await;
    let job = desk.send(&desk.site.lasting(600)).await;
    desk.is_in(job, Stage::Generate).await;
    desk.daemon.kill();
    desk.daemon = desk.site.start();
    let detail = desk.ends(job, JobState::Dead, ErrorCode::WorkerDied).await;
    assert_eq!((detail.attempts.len(), detail.attempts[0].outcome.as_str()), (1, "lost"));
    assert_eq!((detail.failures.suspect, detail.failures.infra), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_ends_a_job_wherever_it_is_and_spends_nothing() {
    let proxy = Proxy::to(s3::shared().port).await;
    let desk = Desk::new(site_behind(&proxy).await).await;
    proxy.set(Fault::HalfOpen);

    let fetching = desk.send(&reads("s3://main/slow/a.txt")).await;
    desk.is_in(fetching, Stage::Fetch).await;
    desk.store.cancel(fetching).await.expect("asked");
    desk.ends(fetching, JobState::Cancelled, ErrorCode::Cancelled).await;

    let running = desk.send(&desk.site.lasting(6000)).await;
    desk.is_in(running, Stage::Generate).await;
    // The places before the engine are taken by jobs that are more urgent.
    let mut urgent = desk.site.lasting(6000);
    urgent["priority"] = json!(9);
    let ahead = [desk.send(&urgent).await, desk.send(&urgent).await];
    until("they are prepared", || async {
        let held = ahead.map(|job| desk.shown(job));
        let held = futures_util::future::join_all(held).await;
        held.iter().flatten().any(|detail| detail.summary.state == JobState::Running)
    })
    .await;
    let mut lazy = desk.site.lasting(6000);
    lazy["priority"] = json!(0);
    let queued = desk.send(&lazy).await;
    until("it is taken in", || async { desk.shown(queued).await.is_some() }).await;
    assert_eq!(desk.shown(queued).await.expect("there").summary.state, JobState::Queued);
    desk.store.cancel(queued).await.expect("cancelled");
    let detail = desk.ends(queued, JobState::Cancelled, ErrorCode::Cancelled).await;
    assert!(detail.attempts.is_empty(), "it never ran");

    for job in ahead {
        desk.store.cancel(job).await.expect("cancelled");
    }
    desk.store.cancel(running).await.expect("asked");
    for job in [running, ahead[0], ahead[1]] {
        let detail = ended(&*desk.store, job).await;
        assert_eq!((detail.summary.state, detail.failures.suspect), (JobState::Cancelled, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_job_before_its_claim_in_its_fetch_and_in_the_engine() {
    let proxy = Proxy::to(s3::shared().port).await;
    let desk = Desk::new(site_behind(&proxy).await).await;
    proxy.set(Fault::HalfOpen);
    let until_then = |mut body: Value, deadline: TimeDelta| {
        body["deadline"] = json!(Utc::now() + deadline);
        body
    };
    let late = desk.send(&until_then(desk.site.lasting(1), TimeDelta::seconds(-1))).await;
    let detail = desk.ends(late, JobState::Failed, ErrorCode::DeadlineExceeded).await;
    assert!(detail.attempts.is_empty(), "it never ran");
    for (body, stage) in [(reads("s3://main/slow/a.txt"), Stage::Fetch), (desk.site.lasting(6000), Stage::Generate)] {
        // Far enough for it to be claimed, also by a machine that compiles at the same time.
        let job = desk.send(&until_then(body, TimeDelta::seconds(6))).await;
        desk.is_in(job, stage).await;
        let detail = desk.ends(job, JobState::Failed, ErrorCode::DeadlineExceeded).await;
        assert_eq!((detail.attempts.len(), detail.failures.suspect, detail.failures.infra), (1, 0, 0));
    }
    // The engine was told to stop, not killed: it serves the next job.
    let next = desk.send(&desk.site.lasting(1)).await;
    assert_eq!(ended(&*desk.store, next).await.attempts.len(), 1);
    assert!(!desk.daemon.log().contains("the engine is replaced"), "{}", desk.daemon.log());
}
