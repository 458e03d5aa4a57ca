//! One document over several processes, as over several machines: the same result as in one, and nobody waits for ever for a node that does not come or dies.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use apbd::comm::hub::Place;
use apbd::engine::{Driver, Engine, EngineError, Job, LocalEngine, LocalOptions, Progress};
use apbd::generate::generator::Step;
use apbd::plan::{AttentionMode, AttentionRequest};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;

const MODEL: &str = "fixtures/goldens/llama-3.1";
/// Long enough for a process to be killed in the middle of it.
const SHIPPED_MODEL: &str = "fixtures/model";
/// What the nodes of a group know each other by.
const TOKEN: &str = "of this test";
/// The reason when the second of the nodes, each with one rank, was killed.
const LOST: &str = "rank 1 aborted: the connection to its node was lost";

/// Nodes of a group, by number; killed with the test. Their standard inputs are kept open: a node ends with it.
struct Followers(Vec<Child>, Vec<ChildStdin>);

impl Followers {
    fn of(mut nodes: Vec<Child>) -> Self {
        let inputs = nodes.iter_mut().map(|node| node.stdin.take().unwrap()).collect();
        Self(nodes, inputs)
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        self.1.clear();
        for follower in &mut self.0 {
            let _ = follower.kill();
            let _ = follower.wait();
        }
    }
}

/// Where the nodes of a test meet.
struct Group {
    nodes: usize,
    hub: String,
    start_s: u64,
    directory: TempDir,
}

impl Group {
    fn new(nodes: usize, start_s: u64) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { nodes, hub: format!("127.0.0.1:{port}"), start_s, directory: TempDir::new().unwrap() }
    }

    fn apbd(&self, subcommand: &str, model: &str, node: usize) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
        command.args([subcommand, "--model", model, "--threads", "1", "--hub", &self.hub]);
        command.args(["--nodes", &self.nodes.to_string(), "--node", &node.to_string()]);
        command.args(["--hub-start-s", &self.start_s.to_string()]).env("APBD_HUB_TOKEN", TOKEN);
        command
    }

    /// The first node's place, for one that runs in this process.
    fn place(&self) -> Place {
        let (listen, address) = (self.hub.clone(), self.hub.clone());
        let start = Duration::from_secs(self.start_s);
        Place { node: 0, nodes: self.nodes, listen, address, token: TOKEN.to_owned(), start }
    }

    /// Starts all nodes but the first.
    fn followers(&self, model: &str, ranks: usize) -> Followers {
        let start = |node| {
            let mut command = self.apbd("engine", model, node);
            command.args(["--ranks", &ranks.to_string()]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
        };
        Followers::of((1..self.nodes).map(start).collect())
    }

    /// Runs the first node with a context of so many tokens.
    fn first(&self, model: &str, context: usize, options: &[&str]) -> Child {
        let tokens = tokens(context);
        let input = self.directory.path().join("input.json");
        let (context, query) = tokens.split_at(context);
        std::fs::write(&input, serde_json::json!({ "context": context, "query": query }).to_string()).unwrap();
        let mut command = self.apbd("forward", model, 0);
        command.arg("--input").arg(input).args(["--steps", "3"]).args(options);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

/// A context of so many tokens, and a query after it.
fn tokens(context: usize) -> Vec<u32> {
    let mut random = StdRng::seed_from_u64(1);
    (0..context + 5).map(|_| random.random_range(3..90)).collect()
}

fn logits(output: &Output) -> Vec<f64> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    result["last_logits"].as_array().unwrap().iter().map(|logit| logit.as_f64().unwrap()).collect()
}

/// Kills the second node once the first has done a layer, and counts those that it still does.
struct Killer {
    followers: Followers,
    layers_done: usize,
    layers: usize,
}

impl Driver for Killer {
    fn progress(&mut self, progress: Progress) -> bool {
        if let Progress::Prefill { layers_done, layers } = progress {
            (self.layers_done, self.layers) = (layers_done, layers);
            if layers_done == 1 {
                self.followers.0[0].kill().unwrap();
            }
        }
        true
    }

    fn next(&mut self, _: &mut [f32]) -> Result<Step, EngineError> {
        Ok(Step::Stop)
    }
}

/// Waits for the end of a first node, which has to be a fault of apbd with this reason.
fn fails(first: Child, reason: &str) {
    let ended = first.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(70), "{said}");
    assert!(said.contains(reason), "{said}");
}

#[test]
fn processes_that_meet_at_a_hub_give_what_one_process_gives() {
    let strategies: [&[&str]; 4] = [
        &["--attention", "ring", "--hosts", "4"],
        &["--attention", "ulysses", "--hosts", "4"],
        &["--attention", "star", "--hosts", "4"],
        &["--attention", "apb", "--hosts", "4", "--anchor", "20", "--passing", "6", "--placement", "paired"],
    ];
    for (strategy, (nodes, ranks)) in strategies.iter().zip([(2, "1"), (3, "1"), (2, "2"), (2, "2")]) {
        let alone = Group::new(1, 30).first(MODEL, 120, strategy).wait_with_output().unwrap();
        let group = Group::new(nodes, 60);
        let mut followers = group.followers(MODEL, ranks.parse().unwrap());
        let options = [strategy, &["--ranks", ranks][..]].concat();
        let first = group.first(MODEL, 120, &options).wait_with_output().unwrap();
        for (got, expected) in logits(&first).iter().zip(logits(&alone)) {
            assert!((got - expected).abs() < 1e-3, "{strategy:?} on {nodes} nodes: {got} and {expected}");
        }
        for follower in &mut followers.0 {
            assert!(follower.wait().unwrap().success(), "{strategy:?}: a node did not end well");
        }
    }
}

#[test]
fn a_node_that_never_comes_is_named_within_the_deadline() {
    let (group, start) = (Group::new(2, 2), Instant::now());
    fails(group.first(MODEL, 50, &[]), "of 2 nodes number 1 did not come within 2 s");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn a_node_whose_first_never_comes_says_where_it_looked() {
    let group = Group::new(2, 1);
    let mut command = group.apbd("engine", MODEL, 1);
    let node = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut followers = Followers::of(vec![node]);
    let status = followers.0[0].wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut followers.0[0].stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(status.code(), Some(70), "{said}");
    assert!(said.contains(&format!("the first node at {} was not there within 1 s", group.hub)), "{said}");
}

#[test]
fn the_death_of_a_node_in_mid_prefill_ends_the_others_at_once() {
    let group = Group::new(3, 60);
    let mut followers = group.followers(SHIPPED_MODEL, 1);
    let apb = ["--attention", "apb", "--hosts", "6", "--anchor", "1000", "--passing", "500"];
    let mut first = group.first(SHIPPED_MODEL, 60_000, &apb);
    std::thread::sleep(Duration::from_secs(5));
    assert!(first.try_wait().unwrap().is_none(), "it was over before a node could die");
    let death = Instant::now();
    followers.0[0].kill().unwrap();
    fails(first, LOST);
    assert!(!followers.0[1].wait().unwrap().success(), "the third node did not notice");
    assert!(death.elapsed() < Duration::from_secs(60), "{:?}", death.elapsed());
}

#[test]
fn a_node_that_a_plan_does_not_need_is_missed_after_a_layer_and_not_after_all() {
    let group = Group::new(2, 60);
    let followers = group.followers(SHIPPED_MODEL, 1);
    let options = LocalOptions { threads: 1, place: Some(group.place()), ..LocalOptions::default() };
    let first = LocalEngine::open(Path::new(SHIPPED_MODEL), &options).unwrap();
    // Read by the first node alone, in eight layers: each takes a second, or more on a slow machine; a death is heard of in milliseconds.
    let tokens = tokens(16_000);
    let (context, query) = tokens.split_at(16_000);
    let request = AttentionRequest { mode: Some(AttentionMode::Full), ..AttentionRequest::default() };
    let plan = first.plan(context.len(), query.len(), 0, &request).unwrap();
    let mut killer = Killer { followers, layers_done: 0, layers: 0 };
    let error = first.run(&Job { context, query, plan: &plan, new_tokens: 3 }, &mut killer).unwrap_err();
    assert!(error.to_string().contains(LOST), "{error}");
    assert!(killer.layers_done >= 1, "missed before it was killed");
    assert!(killer.layers_done <= killer.layers / 2, "missed after {} of {}", killer.layers_done, killer.layers);
}
