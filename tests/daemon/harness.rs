//! A daemon as a process, with a database of its own, and what looks at it from outside.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use apbd::intake::amqp::{Broker, Message, Publisher, Topology};
use apbd::job::JobId;
use apbd::job::retry::RetryPolicy;
use apbd::store::{Access, JobDetail, JobFilter, JobState, JobSummary, Roles, Store, StoreUrl, migrate, open};
use apbd::telemetry::health::Health;
use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::services::postgres::Postgres;
use crate::services::{free_port, rabbitmq};

/// Long enough for a machine that compiles at the same time; nothing is measured by it.
pub const SOON: Duration = Duration::from_secs(60);

/// What is promised after the broker is back, or a connection to it was lost.
pub const CONSUMING_AGAIN: Duration = Duration::from_secs(30);

/// Where the model does not matter.
const SCRIPTED_ENGINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/daemon/scripted_engine.py");

/// A place for daemons: a folder of documents, a database, a queue.
pub struct Site {
    pub directory: TempDir,
    pub queue: String,
    pub broker_url: String,
    pub database: StoreUrl,
    /// Lines of `[engine]`.
    pub engine: String,
    pub lease_s: u32,
    /// What is logged.
    pub log: &'static str,
    pub extra: String,
    pub variables: BTreeMap<String, String>,
}

impl Site {
    /// With an engine that takes so many requests at a time.
    pub fn with_concurrency(concurrency: usize) -> Self {
        let engine =
            format!("command = [\"python3\", \"{SCRIPTED_ENGINE}\", \"{concurrency}\"]\nsilence_floor_s = 2\n");
        Self { engine, ..Self::new() }
    }

    /// With a pool of these groups: name, documents at a time, memory in bytes; the later ones are the larger.
    pub fn with_groups(groups: &[(&str, usize, usize)]) -> Self {
        let mut extra = String::new();
        for (number, (name, concurrency, memory)) in groups.iter().enumerate() {
            let ranks = number + 1;
            extra += &format!(
                "[[pool.group]]\nname = \"{name}\"\nranks = {ranks}\n\
                 command = [\"python3\", \"{SCRIPTED_ENGINE}\", \"{concurrency}\", \"{memory}\"]\n"
            );
        }
        Self { engine: "silence_floor_s = 2\n".to_owned(), extra, ..Self::new() }
    }

    /// With a queue of its own on the shared broker.
    pub fn new() -> Self {
        Self::on(&rabbitmq::shared().url())
    }

    /// On a broker of the test's own.
    pub fn on(broker_url: &str) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        fs::create_dir(directory.path().join("documents")).expect("made");
        let database = StoreUrl::Sqlite(directory.path().join("jobs.db"));
        let site = Self {
            directory,
            database,
            queue: format!("jobs-{}", JobId::random()),
            broker_url: broker_url.to_owned(),
            engine: format!("command = [\"python3\", \"{SCRIPTED_ENGINE}\"]\nsilence_floor_s = 2\n"),
            lease_s: 3,
            log: "info",
            extra: String::new(),
            variables: BTreeMap::new(),
        };
        site.document("plain.txt", "A few words to read.");
        site
    }

    /// With a migrated database of its own on `server`, which several daemons can share.
    pub async fn on_postgres(server: &Postgres) -> Self {
        let database: StoreUrl = server.database().parse().expect("a URL");
        migrate(&database, &Roles::default()).await.expect("migrated");
        let mut site = Self::new();
        site.database = database;
        site.variables.insert("APBD_AMQP_WINDOW".to_owned(), "2000".to_owned());
        site.variables.insert("APBD_AMQP_PREFETCH".to_owned(), "200".to_owned());
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a document and returns its URI.
    pub fn document(&self, name: &str, text: &str) -> String {
        let path = self.path("documents").join(name);
        fs::write(&path, text).expect("written");
        format!("file://{}", path.display())
    }

    /// Writes the configuration.
    pub fn configuration(&self, port: u16) -> PathBuf {
        let text = format!(
            "[database]\nurl = \"{}\"\n[amqp]\nurl = \"{}\"\nqueue = \"{}\"\nreply_targets = [\"done-*\"]\nwindow = 50\nprefetch = 20\n\
             [files]\nfolders = [\"{}\"]\n[engine]\n{}\
             [work]\nlease_s = {}\npoll_ms = 20\ngrace_s = 2\nmax_attempts = 2\n[http]\nlisten = \"127.0.0.1:{port}\"\n{}",
            database_url(&self.database),
            self.broker_url,
            self.queue,
            self.path("documents").display(),
            self.engine,
            self.lease_s,
            self.extra,
        );
        let path = self.path(&format!("apbd-{port}.toml"));
        fs::write(&path, text).expect("written");
        path
    }

    /// Starts a daemon.
    pub fn start(&self) -> Daemon {
        let port = free_port();
        let log = self.path(&format!("daemon-{port}.log"));
        let child = Command::new(env!("CARGO_BIN_EXE_apbd"))
            .args(["--log", self.log, "serve", "--config"])
            .arg(self.configuration(port))
            .envs(&self.variables)
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).expect("a log"))
            .spawn()
            .expect("started");
        Daemon { child, port, log }
    }

    /// Opens the database to look; a daemon makes it.
    pub async fn store(&self) -> Arc<dyn Store> {
        let start = Instant::now();
        loop {
            match open(&self.database, Access::Client, RetryPolicy::default()).await {
                Ok(store) => return store,
                Err(error) => assert!(start.elapsed() < SOON, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A publisher, with the queues declared.
    pub async fn publisher(&self) -> Publisher {
        let broker = Broker::new(&self.broker_url, None, "test").expect("a broker");
        let publisher = Publisher::connect(&broker, &Health::default().component("test")).await.expect("connected");
        Topology::named(&self.queue).ensure(&broker, publisher.channel()).await.expect("declared");
        publisher
    }

    /// Sends a job that does what `seed` says.
    pub async fn send(&self, publisher: &Publisher, seed: u64) -> JobId {
        let id = JobId::random();
        let uri = format!("file://{}", self.path("documents/plain.txt").display());
        let body = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }], "seed": seed, "max_new_tokens": 30 });
        self.send_raw(publisher, id, &body, None).await;
        id
    }

    /// A job that is answered after so many tenths of a second.
    pub fn lasting(&self, tenths: u32) -> Value {
        let uri = format!("file://{}", self.path("documents/plain.txt").display());
        json!({ "version": 1, "task": "summarise", "documents": [{ "uri": uri }], "seed": 4, "max_new_tokens": tenths })
    }

    /// Sends a job that is answered after so many tenths of a second.
    pub async fn send_lasting(&self, publisher: &Publisher, tenths: u32) -> JobId {
        let id = JobId::random();
        self.send_raw(publisher, id, &self.lasting(tenths), None).await;
        id
    }

    /// Sends a job over this document that is answered after so many tenths of a second.
    pub async fn send_over(&self, publisher: &Publisher, uri: &str, tenths: u32) -> JobId {
        let (id, mut body) = (JobId::random(), self.lasting(tenths));
        body["documents"] = json!([{ "uri": uri }]);
        self.send_raw(publisher, id, &body, None).await;
        id
    }

    /// Sends any JSON.
    pub async fn send_raw(&self, publisher: &Publisher, id: JobId, body: &Value, reply_to: Option<&str>) {
        let body = body.to_string();
        let message = Message {
            exchange: "",
            routing_key: &self.queue,
            id: id.to_string(),
            correlation_id: reply_to.map(|_| "mark"),
            reply_to,
            headers: Vec::new(),
            body: body.as_bytes(),
        };
        publisher.publish(&message).await.expect("published");
    }
}

/// What SQL says about the site's database.
pub fn sql(server: &Postgres, site: &Site, query: &str) -> String {
    let StoreUrl::Postgres(url) = &site.database else { panic!("not on PostgreSQL") };
    server.sql(url.rsplit_once('/').expect("a name").1, query)
}

/// As a configuration has it: how a location is displayed leaves out who connects.
fn database_url(url: &StoreUrl) -> String {
    match url {
        StoreUrl::Postgres(text) => text.clone(),
        StoreUrl::Sqlite(_) => url.to_string(),
    }
}

/// A daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    pub port: u16,
    log: PathBuf,
}

impl Daemon {
    pub fn signal(&self, name: &str) {
        let status = Command::new("sh").args(["-c", "kill -$0 $1", name, &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The processes of its engines: its children.
    pub fn engines(&self) -> Vec<u32> {
        // A thread's children are those that it started.
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.id())) else { return Vec::new() };
        let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        children.flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// What it had resident at most, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("asked").is_none()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; its exit code.
    pub fn ended(&mut self, within: Duration) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("asked") {
                return status.code();
            }
            assert!(start.elapsed() < within, "the daemon has not ended:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Status and body of a GET.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let status = text.split(' ').nth(1)?.parse().ok()?;
        Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
    }

    /// Waits until it says that it is ready.
    pub async fn ready(&self) {
        until("the daemon is ready", || async { self.get("/readyz").is_some_and(|(status, _)| status == 200) }).await;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("log of the daemon:\n{}", self.log());
        }
    }
}

/// Waits for something.
pub async fn until<F: Future<Output = bool>>(what: &str, mut is: impl FnMut() -> F) {
    let start = Instant::now();
    while !is().await {
        assert!(start.elapsed() < SOON, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

pub async fn all(store: &dyn Store) -> Vec<JobSummary> {
    let filter = JobFilter { states: Vec::new(), only: None, limit: 10_000 };
    store.list(&filter).await.expect("listed")
}

/// Waits until so many jobs are there and none is unfinished.
pub async fn settled(store: &dyn Store, count: usize) -> Vec<JobSummary> {
    let start = Instant::now();
    loop {
        let jobs = all(store).await;
        if jobs.len() == count && jobs.iter().all(|job| job.state.is_final()) {
            return jobs;
        }
        assert!(
            start.elapsed() < 2 * SOON,
            "{} of {count} jobs are there, unfinished: {:?}",
            jobs.len(),
            jobs.iter().filter(|job| !job.state.is_final()).count()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits for the end of a job.
pub async fn ended(store: &dyn Store, job: JobId) -> JobDetail {
    let start = Instant::now();
    loop {
        if let Some(detail) = store.show(job).await.expect("shown").filter(|detail| detail.summary.state.is_final()) {
            return detail;
        }
        assert!(start.elapsed() < SOON, "the job has not ended");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Waits until the daemon consumes again: until this job of it has succeeded.
pub async fn consumes_again(store: &dyn Store, job: JobId) -> JobDetail {
    let again = tokio::time::timeout(CONSUMING_AGAIN, succeeded(store, job)).await;
    again.unwrap_or_else(|_| panic!("it does not consume again within {CONSUMING_AGAIN:?}"))
}

pub async fn succeeded(store: &dyn Store, job: JobId) -> JobDetail {
    let detail = ended(store, job).await;
    assert_eq!(detail.summary.state, JobState::Succeeded, "{:?}", detail.summary.error);
    detail
}

/// Takes a message out of a queue, if one comes soon.
pub async fn message(publisher: &Publisher, queue: &str) -> lapin::message::Delivery {
    let start = Instant::now();
    loop {
        let options = BasicGetOptions { no_ack: true };
        if let Some(message) = publisher.channel().basic_get(queue.into(), options).await.expect("asked") {
            return message.delivery;
        }
        assert!(start.elapsed() < SOON, "nothing comes to {queue}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Messages that are ready in a queue.
pub async fn waiting(publisher: &Publisher, queue: &str) -> u32 {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    publisher
        .channel()
        .queue_declare(queue.into(), options, FieldTable::default())
        .await
        .expect("there")
        .message_count()
}

pub async fn declare(publisher: &Publisher, queue: &str) {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    publisher.channel().queue_declare(queue.into(), options, FieldTable::default()).await.expect("declared");
}

pub fn apbd(arguments: &[&str], input: &Path) -> std::process::Output {
    let input = fs::File::open(input).expect("an input");
    Command::new(env!("CARGO_BIN_EXE_apbd")).args(arguments).stdin(input).output().expect("run")
}
