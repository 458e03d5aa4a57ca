//! Load: how many small jobs a second go from the queue to a committed result, with a table of finished jobs behind them.
//!
//! `cargo bench --bench load [-- JOBS [FINISHED]]` (100,000 jobs, 1,000,000 finished) starts a RabbitMQ and a PostgreSQL of its own, with commits
//! that are flushed, and `apbd serve` with an engine that answers at once; prints one JSON line a figure: rate, resident memory of the daemon's
//! process on the way, percentiles of the claim, time of each report view. Only the model is missing: this program plays the engine's
//! process over the real protocol.

#[path = "../services/mod.rs"]
mod services;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use apbd::engine::{Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer};
use apbd::generate::StopReason;
use apbd::intake::amqp::{Broker, Message, Publisher, Topology};
use apbd::job::retry::RetryPolicy;
use apbd::job::{JobId, WorkerId};
use apbd::plan::{AttentionRequest, Capabilities, PrefillPlan};
use apbd::store::{Access, ClaimRequest, ReportView, Roles, Store, StoreUrl, migrate, open};
use apbd::supervise::child;
use apbd::telemetry::health::Health;
use futures_util::StreamExt;
use serde_json::json;

use services::{free_port, postgres::Postgres, rabbitmq::RabbitMq};

/// Unconfirmed messages of the producer.
const PUBLISHED_AT_ONCE: usize = 200;
/// Claims whose time is taken.
const CLAIMS: usize = 1000;
const QUEUE: &str = "load";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "engine") {
        child::serve(|| Ok(Arc::new(AtOnce))).expect("the daemon's socket");
        return;
    }
    let mut numbers = arguments.iter().filter_map(|argument| argument.parse().ok());
    let (jobs, finished) = (numbers.next().unwrap_or(100_000), numbers.next().unwrap_or(1_000_000));
    tokio::runtime::Runtime::new().expect("a runtime").block_on(run(jobs, finished));
}

/// Answers at once.
struct AtOnce;

impl Engine for AtOnce {
    fn info(&self) -> EngineInfo {
        let name = "scripted".to_owned();
        EngineInfo {
            model: name.clone(),
            model_digest: name.clone(),
            max_tokens: 65_536,
            has_retaining_heads: false,
            concurrency: 1,
            device: name,
            shape: None,
        }
    }

    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        attention: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        let capabilities = Capabilities { has_retaining_heads: false, max_hosts: 64 };
        PrefillPlan::new(context, query, query_at, attention, capabilities)
            .map_err(|error| EngineError::Input { reason: error.to_string() })
    }

    fn infer(&self, request: &InferRequest, _observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let plan = self.plan(request.context.len(), request.query.len(), request.query_at, &request.attention)?;
        let time = Duration::from_micros(1);
        let text = "read".to_owned();
        Ok(InferOutcome { tokens: vec![7], text, stop: StopReason::EndOfText, plan, prefill: time, generate: time })
    }
}

async fn run(jobs: usize, finished: usize) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{}", json!({ "cores": cores, "jobs": jobs, "finished_before": finished }));
    let (server, broker) = (Postgres::start(), RabbitMq::start(""));
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let url = server.database();
    let database = url.rsplit_once('/').expect("a name").1.to_owned();
    let store_url: StoreUrl = url.parse().expect("a URL");
    migrate(&store_url, &Roles::default()).await.expect("migrated");
    for setting in ["fsync", "synchronous_commit"] {
        assert_eq!(server.sql(&database, &format!("SHOW {setting}")), "on");
    }
    fill(&server, &database, finished);
    publish(&broker.url(), directory.path(), jobs).await;
    let mut daemon = serve(directory.path(), &url, &broker.url());
    follow(&mut daemon, &server, &database, jobs).await;
    daemon.kill().expect("killed");
    daemon.wait().expect("waited for");
    let store = open(&store_url, Access::Worker, RetryPolicy::default()).await.expect("opens");
    claims(&*store, &server, &database).await;
    for view in ReportView::ALL {
        let began = Instant::now();
        store.report(view, 100).await.expect("reported");
        println!("{}", json!({ "view": view.as_str(), "ms": began.elapsed().as_secs_f64() * 1e3 }));
    }
    store.close().await;
}

/// Finished jobs as a month of work leaves them, with the sums that the reports are made of.
fn fill(server: &Postgres, database: &str, count: usize) {
    let began = Instant::now();
    let statements = [
        format!(
            "INSERT INTO jobs (job_id, payload_digest, message, task, document, served_by, priority, door, origin, state, attempt, available_at, \
             enqueued_at, started_at, finished_at, tokens_in, tokens_out, size_bytes) \
             SELECT gen_random_uuid(), i::text, '{{}}', (ARRAY['summarise', 'extract', 'ask'])[1 + i % 3], 'file:///' || i, 'filler', 4, 'amqp', 'filler', \
             'succeeded', 1, t, t, t, t + interval '1 second', 1000, 100, 4000 \
             FROM (SELECT i, now() - i * interval '2 seconds' AS t FROM generate_series(1, {count}) AS i) AS times"
        ),
        "INSERT INTO attempts (job_id, attempt, worker, started_at, ended_at, outcome, queue_ms, fetch_ms, decode_ms, tokenize_ms, prefill_ms, generate_ms, record_ms) \
         SELECT job_id, 1, 'filler', started_at, finished_at, 'succeeded', 10, 2, 1, 3, random() * 1000, random() * 500, 1 FROM jobs"
            .to_owned(),
        "INSERT INTO results SELECT job_id, 1, 'read', NULL, 1000, 100, 'end_of_text', 'filler', 'filler', 'none', '{}', false, false, 'none', false, false, false FROM jobs"
            .to_owned(),
        "INSERT INTO endings_hourly SELECT date_trunc('hour', finished_at, 'UTC'), task, served_by, state, 0, count(*), sum(tokens_in), sum(tokens_out) \
         FROM jobs GROUP BY 1, 2, 3, 4"
            .to_owned(),
        "INSERT INTO stage_times SELECT task, served_by, stage, ceil(ln(greatest(ms * 1000, 1)) / ln(1.02)), 0, count(*), sum(ms) \
         FROM jobs JOIN attempts USING (job_id), LATERAL (VALUES ('queue', queue_ms), ('fetch', fetch_ms), ('decode', decode_ms), \
         ('tokenize', tokenize_ms), ('prefill', prefill_ms), ('generate', generate_ms), ('record', record_ms)) AS t (stage, ms) GROUP BY 1, 2, 3, 4"
            .to_owned(),
        "VACUUM ANALYZE".to_owned(),
    ];
    for statement in statements {
        server.sql(database, &statement);
    }
    println!("{}", json!({ "filled_s": began.elapsed().as_secs_f64() }));
}

async fn publish(url: &str, directory: &Path, jobs: usize) {
    fs::write(directory.join("plain.txt"), "A few words to read.").expect("written");
    let broker = Broker::new(url, None, "load").expect("a broker");
    let publisher = Publisher::connect(&broker, &Health::default().component("load")).await.expect("connected");
    Topology::named(QUEUE).ensure(&broker, publisher.channel()).await.expect("declared");
    let uri = format!("file://{}", directory.join("plain.txt").display());
    let body = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }] }).to_string();
    let began = Instant::now();
    futures_util::stream::iter(0..jobs)
        .for_each_concurrent(PUBLISHED_AT_ONCE, |_| async {
            let message = Message {
                exchange: "",
                routing_key: QUEUE,
                id: JobId::random().to_string(),
                correlation_id: None,
                reply_to: None,
                headers: Vec::new(),
                body: body.as_bytes(),
            };
            publisher.publish(&message).await.expect("published");
        })
        .await;
    println!("{}", json!({ "published_s": began.elapsed().as_secs_f64() }));
}

fn serve(directory: &Path, database: &str, broker: &str) -> Child {
    let engine = std::env::current_exe().expect("this program");
    let text = format!(
        "[database]\nurl = \"{database}\"\n[amqp]\nurl = \"{broker}\"\nqueue = \"{QUEUE}\"\nwindow = 5000\nprefetch = 500\n[files]\nfolders = [\"{}\"]\n\
         [engine]\ncommand = [\"{}\", \"engine\"]\n[work]\nahead = 64\npoll_ms = 20\n[http]\nlisten = \"127.0.0.1:{}\"\n",
        directory.display(),
        engine.display(),
        free_port(),
    );
    let path = directory.join("apbd.toml");
    fs::write(&path, text).expect("written");
    Command::new(env!("CARGO_BIN_EXE_apbd"))
        .args(["--log", "warn", "serve", "--config"])
        .arg(path)
        .stdin(Stdio::null())
        .spawn()
        .expect("started")
}

/// Prints memory on the way, and the rate by the database's own times: from the first job taken in to the last one finished.
async fn follow(daemon: &mut Child, server: &Postgres, database: &str, jobs: usize) {
    let progress = "SELECT coalesce(sum(jobs), 0) FROM endings_hourly WHERE model = 'scripted' AND state = 'succeeded'";
    let (mut told, mut looked) = (0, Instant::now());
    loop {
        assert!(daemon.try_wait().expect("asked").is_none(), "the daemon has ended");
        let done: usize = server.sql(database, progress).parse().expect("a count");
        if done >= told + jobs / 10 || done == jobs {
            println!("{}", json!({ "done": done, "resident_mib": resident_mib(daemon.id()) }));
            (told, looked) = (done, Instant::now());
        }
        if done == jobs {
            break;
        }
        assert!(looked.elapsed() < Duration::from_secs(600), "no more than {done} of {jobs} jobs have succeeded");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let sql = "SELECT count(*) / extract(epoch FROM max(finished_at) - min(enqueued_at)) FROM jobs WHERE origin = 'load' AND state = 'succeeded'";
    let rate: f64 = server.sql(database, sql).parse().expect("a rate");
    println!("{}", json!({ "jobs_per_s": rate.round() }));
}

fn resident_mib(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Times of the claim of one job, commit included.
async fn claims(store: &dyn Store, server: &Postgres, database: &str) {
    let requeue = format!(
        "UPDATE jobs SET state = 'queued', finished_at = NULL \
         WHERE job_id IN (SELECT job_id FROM jobs WHERE origin = 'load' LIMIT {CLAIMS})"
    );
    server.sql(database, &requeue);
    let request = ClaimRequest {
        worker: WorkerId::unique("load", std::process::id()),
        limit: 1,
        lease: Duration::from_secs(60),
        models: Vec::new(),
        max_bytes: Some(1 << 30),
        only: None,
    };
    let mut times = Vec::new();
    loop {
        let began = Instant::now();
        if store.claim(&request).await.expect("claimed").is_empty() {
            break;
        }
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
    println!("{}", json!({ "claims": times.len(), "p50_ms": at(50), "p95_ms": at(95), "p99_ms": at(99) }));
}
