//! A group on several nodes, here as processes: they meet through the database, in whatever order they come; when one of them dies all begin again, at
//! the cost of the document that was in them; one that is told to stop costs nothing.

use std::fs::{self, OpenOptions};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use apbd::intake::amqp::Publisher;
use apbd::job::JobId;
use apbd::store::JobState;
use serde_json::json;

use crate::harness::{Daemon, SOON, Site, ended, succeeded, until};
use crate::services::{free_port, listens};

/// From the death of a node to an engine that is ready again: a second until everybody has noticed, two models of 15 MB; and a busy machine.
const READY_AGAIN: Duration = Duration::from_secs(30);
/// Sentences of a document that takes seconds to read, a core each: long enough for a node to die in the middle of it.
const SENTENCES: usize = 1000;
/// From its place in the engine until both nodes are at it; the database knows how far it is with the next heartbeat, and is not waited for.
const BEGUN: Duration = Duration::from_millis(300);

/// Two nodes, with one thread each.
struct Group {
    site: Site,
    hub: u16,
}

impl Group {
    fn new() -> Self {
        let (mut site, hub) = (Site::new(), free_port());
        site.engine = "start_within_s = 120\n".to_owned();
        site.extra = format!(
            "[[pool.group]]\ncpu_threads = 1\nnodes = 2\naddress = \"127.0.0.1:{hub}\"\nlisten = \"127.0.0.1:{hub}\"\nnodes_within_s = 60\n"
        );
        // Of the time that a document may take once a node is told to stop.
        site.variables.insert("APBD_WORK_GRACE_S".to_owned(), "60".to_owned());
        Self { site, hub }
    }

    /// Sends a document that takes seconds to read, in every layer of which both nodes need each other; returns once they are at it.
    async fn send_long(&self, publisher: &Publisher, daemon: &Daemon) -> JobId {
        let words: String = (0..SENTENCES).map(|number| format!("word {number} of many. ")).collect();
        let (id, mut body) = (JobId::random(), self.site.lasting(5));
        body["documents"] = json!([{ "uri": self.site.document("long.txt", &words) }]);
        body["attention"] = json!({ "mode": "ring", "hosts": 4 });
        self.site.send_raw(publisher, id, &body, None).await;
        let is_in_it = |metrics: &str| metrics.lines().any(|line| line == "apbd_group_documents{group=\"1\"} 1");
        until("the long one is in the engine", || async {
            daemon.get("/metrics").is_some_and(|(_, text)| is_in_it(&text))
        })
        .await;
        tokio::time::sleep(BEGUN).await;
        id
    }
}

/// A node beside the first; killed when dropped.
struct Node(Child);

impl Node {
    fn start(site: &Site, port: u16) -> Self {
        let log = OpenOptions::new().create(true).append(true).open(site.path("node.log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
        command
            .args(["--log", "info", "node", "--node", "1", "--config"])
            .arg(site.configuration(port))
            .envs(&site.variables);
        Self(command.stdin(Stdio::null()).stderr(log).spawn().expect("started"))
    }

    /// The process of its engine, if there is one.
    fn engine(&self) -> Option<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).ok()?;
        let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        children.flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).next()
    }

    /// Kills its engine as an operating system does that has no memory left. Gives its number.
    fn kill_engine(&self) -> u32 {
        let engine = self.engine().expect("an engine of the second node");
        signal(engine, "KILL");
        engine
    }

    /// Waits for its end; its exit code.
    fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("asked") {
                return status.code();
            }
            assert!(start.elapsed() < SOON, "the node has not ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal(process: u32, name: &str) {
    let status = Command::new("sh").args(["-c", "kill -$0 $1", name, &process.to_string()]).status();
    assert!(status.expect("kill runs").success());
}

fn node_log(site: &Site) -> String {
    fs::read_to_string(site.path("node.log")).unwrap_or_default()
}

fn is_ready(daemon: &Daemon) -> bool {
    daemon.get("/readyz").is_some_and(|(status, _)| status == 200)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_work_on_a_document_together_and_begin_again_after_one_has_died() {
    let group = Group::new();
    let site = &group.site;
    let daemon = site.start();
    let store = site.store().await;
    let node = Node::start(site, daemon.port);
    daemon.ready().await;
    let publisher = site.publisher().await;
    let short = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, short).await.attempts.len(), 1);
    let job = group.send_long(&publisher, &daemon).await;
    let (killed, at) = (node.kill_engine(), Instant::now());
    until("the first node notices", || async { !is_ready(&daemon) }).await;
    daemon.ready().await;
    assert!(at.elapsed() < READY_AGAIN, "{:?}\n{}\n{}", at.elapsed(), daemon.log(), node_log(site));
    let detail = ended(&*store, job).await;
    let logs = format!("{}\n{}", daemon.log(), node_log(site));
    assert_eq!(detail.summary.state, JobState::Succeeded, "{:?}\n{logs}", detail.summary.error);
    assert_eq!(detail.attempts.len(), 2, "the first attempt died with the node");
    assert!(node.engine().is_some_and(|now| now != killed), "{logs}");
    for told_once in ["the engine is replaced", "a new engine is ready"] {
        assert_eq!(daemon.log().matches(told_once).count(), 1, "{told_once}\n{logs}");
    }
    assert!(daemon.log().contains("rank 1 aborted: the connection to its node was lost"), "{logs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_an_idle_node_or_of_the_first_one_costs_no_job_an_attempt() {
    let group = Group::new();
    let site = &group.site;
    let mut daemon = site.start();
    let (store, publisher) = (site.store().await, site.publisher().await);
    let node = Node::start(site, daemon.port);
    daemon.ready().await;
    let at = Instant::now();
    node.kill_engine();
    // With no job to find it out.
    until("the first node notices", || async { !is_ready(&daemon) }).await;
    daemon.ready().await;
    assert!(at.elapsed() < READY_AGAIN, "{:?}\n{}\n{}", at.elapsed(), daemon.log(), node_log(site));
    let job = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
    let before = node.engine();
    daemon.kill();
    let daemon = site.start();
    daemon.ready().await;
    let job = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
    assert_ne!(node.engine(), before, "{}", node_log(site));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_may_come_before_the_first_one_which_leaves_nobody_at_the_port_when_it_dies() {
    let group = Group::new();
    let site = &group.site;
    let mut first = site.start();
    until("it waits for the other node", || async { listens(group.hub) }).await;
    first.kill();
    until("nobody waits any more", || async { !listens(group.hub) }).await;
    // What was said by the one that is dead still stands in the database.
    let mut node = Node::start(site, first.port);
    let mut daemon = site.start();
    daemon.ready().await;
    let (store, publisher) = (site.store().await, site.publisher().await);
    let job = site.send(&publisher, 0).await;
    succeeded(&*store, job).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended(SOON), Some(0));
    until("the other hears of the end", || async { node_log(site).contains("the next one is started when") }).await;
    signal(node.0.id(), "TERM");
    assert_eq!(node.ended(), Some(0), "{}", node_log(site));
    // Alone again, it can be stopped while it waits.
    let mut alone = site.start();
    until("it waits for the other node", || async { listens(group.hub) }).await;
    alone.signal("TERM");
    assert_eq!(alone.ended(SOON), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_told_to_stop_leaves_after_the_document_and_another_takes_its_place() {
    let group = Group::new();
    let site = &group.site;
    let daemon = site.start();
    let (store, publisher) = (site.store().await, site.publisher().await);
    let mut node = Node::start(site, daemon.port);
    daemon.ready().await;
    let job = group.send_long(&publisher, &daemon).await;
    signal(node.0.id(), "TERM");
    assert_eq!(node.ended(), Some(0), "{}", node_log(site));
    let detail = succeeded(&*store, job).await;
    assert_eq!(detail.attempts.len(), 1, "{}\n{}", daemon.log(), node_log(site));
    until("the first node notices", || async { !is_ready(&daemon) }).await;
    assert!(daemon.log().contains("its node was told to stop"), "{}", daemon.log());
    let _node = Node::start(site, daemon.port);
    daemon.ready().await;
    let job = site.send(&publisher, 0).await;
    assert_eq!(succeeded(&*store, job).await.attempts.len(), 1);
}
