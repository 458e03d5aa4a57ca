//! Load: how many small jobs a second go from the queue to a committed result, with a table of finished jobs behind them.
//!
//! `cargo bench --bench load [-- JOBS [FINISHED]]` (100,000 jobs, 1,000,000 finished) starts a RabbitMQ and a PostgreSQL of its own, with commits
//! that are flushed, and `apbd serve` with an engine that answers at once; prints one JSON line a figure: the circumstances, rate, resident memory
//! of the daemon's process on the way, percentiles of the claim, time of each report view as the reporter role. Only the model is missing: this
//! program plays the engine's process over the real protocol. Ends badly if a figure is not as good as promised. `results/load.jsonl` is a run.

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
/// Jobs that wait while the reports are made.
const WAITING: usize = 100_000;
/// Looks at each view; the median counts.
const LOOKS: usize = 5;

/// Promised: small jobs from the queue to a committed result.
const JOBS_PER_S: f64 = 500.0;
/// Promised: the claim, at the 99th percentile.
const CLAIM_MS: f64 = 20.0;
/// Promised: each report view.
const VIEW_MS: f64 = 200.0;
/// Flat memory: what the daemon has resident at the end, to what it had after a tenth of the jobs.
const GROWTH: f64 = 1.25;

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
    let (server, broker) = (Postgres::start(), RabbitMq::start(""));
    tell_circumstances(&server, jobs, finished);
    let directory = tempfile::TempDir::new().expect("a temporary directory");
    let url = server.database();
    let database = url.rsplit_once('/').expect("a name").1.to_owned();
    let store_url: StoreUrl = url.parse().expect("a URL");
    let reporter = format!("{database}_reporter");
    let roles = Roles { reporter: Some(reporter.clone()), ..Roles::default() };
    migrate(&store_url, &roles).await.expect("migrated");
    server.sql(&database, &format!("ALTER ROLE {reporter} LOGIN"));
    for setting in ["fsync", "synchronous_commit"] {
        assert_eq!(server.sql(&database, &format!("SHOW {setting}")), "on");
    }
    fill(&server, &database, finished);
    publish(&broker.url(), directory.path(), jobs).await;
    let mut daemon = serve(directory.path(), &url, &broker.url());
    let (rate, growth) = follow(&mut daemon, &server, &database, jobs).await;
    daemon.kill().expect("killed");
    daemon.wait().expect("waited for");
    let store = open(&store_url, Access::Worker, RetryPolicy::default()).await.expect("opens");
    let claim_ms = claims(&*store, &server, &database).await;
    store.close().await;
    let slowest_ms = reports(&server, &database, &server.url(&reporter, &database)).await;
    println!("{}", json!({ "load_average_after": load_average() }));
    let kept = rate >= JOBS_PER_S && growth <= GROWTH && claim_ms < CLAIM_MS && slowest_ms < VIEW_MS;
    assert!(kept, "{rate} jobs/s, memory x {growth:.2}, claim {claim_ms:.1} ms, view {slowest_ms:.1} ms");
}

/// What the figures depend on.
fn tell_circumstances(server: &Postgres, jobs: usize, finished: usize) {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor =
        processor.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1)).unwrap_or("");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let postgres = server.sql("postgres", "SHOW server_version");
    println!(
        "{}",
        json!({ "jobs": jobs, "finished_before": finished, "cores": cores, "processor": processor, "postgres": postgres,
            "build": if cfg!(debug_assertions) { "debug" } else { "release" }, "load_average_before": load_average() })
    );
}

/// Of the last minute: what else the machine does.
fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

/// The slowest view, in milliseconds: each is asked as people ask it, all of it but of the jobs only the newest.
async fn reports(server: &Postgres, database: &str, url: &str) -> f64 {
    use sqlx::Connection;
    let waiting = format!(
        "INSERT INTO jobs (job_id, payload_digest, message, task, document, priority, door, origin, state, attempt, available_at, enqueued_at, \
         size_bytes) SELECT gen_random_uuid(), i::text, '{{}}', 'summarise', 'file:///' || i, i % 10, 'amqp', 'filler', 'queued', 0, now(), now(), 4000 \
         FROM generate_series(1, {WAITING}) AS i"
    );
    server.sql(database, &waiting);
    let bytes: u64 = server.sql(database, "SELECT pg_database_size(current_database())").parse().expect("bytes");
    println!("{}", json!({ "waiting": WAITING, "database_mib": bytes >> 20 }));
    let mut connection = sqlx::PgConnection::connect(url).await.expect("the reporter connects");
    let mut slowest: f64 = 0.0;
    for view in ReportView::ALL {
        let limit = if view == ReportView::Jobs { " LIMIT 100" } else { "" };
        let sql = format!("SELECT * FROM report_{}{limit}", view.as_str());
        let mut times = Vec::new();
        for _ in 0..LOOKS {
            let began = Instant::now();
            let rows =
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql.clone())).fetch_all(&mut connection).await.expect("reported");
            assert!(!rows.is_empty(), "{sql}");
            times.push(began.elapsed().as_secs_f64() * 1e3);
        }
        let first = times[0];
        times.sort_by(f64::total_cmp);
        println!("{}", json!({ "view": view.as_str(), "median_ms": times[LOOKS / 2], "first_ms": first }));
        slowest = slowest.max(times[LOOKS / 2]);
    }
    slowest
}

/// Finished jobs as a month of work leaves them, one in fifty without a result, with the sums that the reports are made of.
fn fill(server: &Postgres, database: &str, count: usize) {
    let began = Instant::now();
    let statements = [
        format!(
            "INSERT INTO jobs (job_id, payload_digest, message, task, document, served_by, priority, door, origin, state, attempt, available_at, \
             enqueued_at, started_at, finished_at, tokens_in, tokens_out, size_bytes, error_code) \
             SELECT gen_random_uuid(), i::text, '{{}}', (ARRAY['summarise', 'extract', 'ask'])[1 + i % 3], 'file:///' || i, 'filler', 4, 'amqp', 'filler', \
             CASE WHEN i % 100 = 7 THEN 'failed' WHEN i % 100 = 8 THEN 'dead' ELSE 'succeeded' END, 1, t, t, t, t + interval '1 second', 1000, 100, 4000, \
             CASE WHEN i % 100 = 7 THEN (ARRAY['document_not_text', 'context_too_long', 'fetch_failed'])[1 + i / 100 % 3] \
                  WHEN i % 100 = 8 THEN 'engine_crashed' END \
             FROM (SELECT i, now() - i * interval '2 seconds' AS t FROM generate_series(1, {count}) AS i) AS times"
        ),
        "INSERT INTO attempts (job_id, attempt, worker, started_at, ended_at, outcome, queue_ms, fetch_ms, decode_ms, tokenize_ms, prefill_ms, generate_ms, record_ms) \
         SELECT job_id, 1, 'filler', started_at, finished_at, CASE state WHEN 'dead' THEN 'quarantined' ELSE state END, 10, 2, 1, 3, random() * 1000, \
         random() * 500, 1 FROM jobs"
            .to_owned(),
        "INSERT INTO rejections SELECT 'amqp', 'filler', i::text, NULL, NULL, (ARRAY['message_invalid', 'location_not_allowed'])[1 + i % 2], 'none', 100, now() \
         FROM generate_series(1, 10000) AS i"
            .to_owned(),
        "INSERT INTO results SELECT job_id, 1, 'read', NULL, 1000, 100, 'end_of_text', 'filler', 'filler', 'none', '{}', false, false, 'none', false, false, false FROM jobs WHERE state = 'succeeded'"
            .to_owned(),
        "INSERT INTO endings_hourly SELECT date_trunc('hour', finished_at, 'UTC'), task, served_by, state, 0, count(*), sum(tokens_in), sum(tokens_out) \
         FROM jobs GROUP BY 1, 2, 3, 4"
            .to_owned(),
        "INSERT INTO stage_times SELECT task, served_by, stage, ceil(ln(greatest(ms * 1000, 1)) / ln(1.02)), 0, count(*), sum(ms) \
         FROM jobs JOIN attempts USING (job_id), LATERAL (VALUES ('queue', queue_ms), ('fetch', fetch_ms), ('decode', decode_ms), \
         ('tokenize', tokenize_ms), ('prefill', prefill_ms), ('generate', generate_ms), ('record', record_ms)) AS t (stage, ms) WHERE state = 'succeeded' GROUP BY 1, 2, 3, 4"
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

/// Prints memory on the way, and the rate by the database's own times: from the first job taken in to the last one finished. Returns the rate,
/// and how memory grew from the first tenth to the end.
async fn follow(daemon: &mut Child, server: &Postgres, database: &str, jobs: usize) -> (f64, f64) {
    let progress = "SELECT coalesce(sum(jobs), 0) FROM endings_hourly WHERE model = 'scripted' AND state = 'succeeded'";
    let (mut told, mut looked, mut resident) = (0, Instant::now(), Vec::new());
    loop {
        assert!(daemon.try_wait().expect("asked").is_none(), "the daemon has ended");
        let done: usize = server.sql(database, progress).parse().expect("a count");
        if done >= told + jobs / 10 || done == jobs {
            let mib = resident_mib(daemon.id()).expect("it runs");
            println!("{}", json!({ "done": done, "resident_mib": mib }));
            resident.push(mib as f64);
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
    (rate, resident.last().zip(resident.first()).map_or(1.0, |(last, first)| last / first))
}

fn resident_mib(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Times of the claim of one job, commit included; the 99th percentile in milliseconds.
async fn claims(store: &dyn Store, server: &Postgres, database: &str) -> f64 {
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
    at(99)
}
