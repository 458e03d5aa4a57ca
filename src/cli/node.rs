//! `apbd node`: another node than the first of a group on several. It takes no jobs: its engine does what the first node's decides.
//!
//! The first node's daemon says in the database that its engine waits; this one then starts its own, and again whenever the first is started again.
//!
//! Told to stop, it leaves between two documents; one that does not end within the grace is cut off, and has an attempt counted.
//!
//! Invariant: a token with which the nodes were joined is not used again: what it was good for is over when this node's engine has ended.

use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tracing::{info, warn};

use super::place::TOKEN_VARIABLE;
use super::run::model;
use super::serve::{engines, load, open_store};
use super::{CliError, Status, runtime};
use crate::config::{Config, GroupConfig, NodesConfig};
use crate::pipeline::shutdown::{self, Phase, Shutdown};
use crate::store::{Access, Store};

/// Between two looks whether the first node waits.
const LOOK: Duration = Duration::from_millis(500);
/// Pause after an engine that ended before the nodes were joined: it may end so every time.
const AGAIN: Duration = Duration::from_secs(5);

/// Arguments of `apbd node`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration (TOML), the same as that of `apbd serve` on the first node.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Which group; it can be left out where one alone is on several nodes.
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// Number of this node: 1 or more, the first one serves.
    #[arg(long, value_name = "N", env = "APBD_NODE")]
    node: usize,
}

impl Args {
    /// Follows the first node until told to stop.
    pub fn execute(self) -> Result<Status, CliError> {
        let config = load(&self.config)?;
        let (group, nodes) = self.place(&config)?;
        let model = model::find(config.engine.model.as_deref()).map_err(CliError::Usage)?;
        let program = engines::program(&config.engine, group, &model)?;
        let program = [program, engines::place(nodes, self.node)].concat();
        let (handle, shutdown) = shutdown::channel();
        runtime()?.block_on(async {
            let told = |phase: Phase| info!(node.phase = ?phase, "told to stop");
            shutdown::on_signals(handle, told).map_err(|error| CliError::Internal(format!("signals: {error}")))?;
            let Some(store) = open_store(&config, Access::Client, &shutdown).await? else { return Ok(Status::Done) };
            let place = Place { address: &nodes.address, program: &program, grace: config.work.grace };
            place.follow(&*store, &shutdown).await;
            store.close().await;
            Ok(Status::Done)
        })
    }

    /// The group that this node is of.
    fn place<'a>(&self, config: &'a Config) -> Result<(&'a GroupConfig, &'a NodesConfig), CliError> {
        let is_wanted = |group: &&GroupConfig| self.group.as_ref().is_none_or(|name| *name == group.name);
        let on_nodes = |group: &'a GroupConfig| Some((group, group.nodes.as_ref()?));
        let mut found = config.engine.groups.iter().filter(is_wanted).filter_map(on_nodes);
        let (Some((group, nodes)), None) = (found.next(), found.next()) else {
            let reason =
                "--group: the configuration has to have one [[pool.group]] of that name with nodes = 2 or more";
            return Err(CliError::Usage(reason.to_owned()));
        };
        if self.node == 0 || self.node >= nodes.count {
            let reason = format!(
                "--node {}: group {} has nodes 1 to {} beside the first",
                self.node,
                group.name,
                nodes.count - 1
            );
            return Err(CliError::Usage(reason));
        }
        Ok((group, nodes))
    }
}

/// Where this node works, and with what.
struct Place<'a> {
    address: &'a str,
    program: &'a [String],
    /// How long a document may take to its end once this node is told to stop.
    grace: Duration,
}

impl Place<'_> {
    /// Has an engine at work whenever the first node waits for one, until told to stop.
    async fn follow(&self, store: &dyn Store, shutdown: &Shutdown) {
        let mut last: Option<Tried> = None;
        info!(node.hub = self.address, "waiting for the first node");
        while shutdown.phase() == Phase::Working {
            match store.meeting_look(self.address).await {
                Ok(Some(token)) if last.as_ref().is_none_or(|last| last.allows(&token)) => {
                    let has_joined = self.work(store, &token, shutdown).await;
                    last = Some(Tried { token, again_at: (!has_joined).then(|| Instant::now() + AGAIN) });
                }
                Ok(_) => {}
                Err(error) => warn!(error.message = %error, "the database does not say where to meet"),
            }
            tokio::select! {
                () = shutdown.draining() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Runs an engine to its end. Whether the nodes were joined.
    async fn work(&self, store: &dyn Store, token: &str, shutdown: &Shutdown) -> bool {
        let mut engine = match Engine::start(self.program, token) {
            Ok(engine) => engine,
            Err(error) => {
                warn!(error.message = %error, program = self.program[0], "the engine could not be started");
                return false;
            }
        };
        info!(engine.pid = engine.process.id(), "the engine is started");
        let pid = engine.process.id();
        let has_joined = tokio::select! {
            has_joined = engine.run(self.grace, shutdown) => has_joined,
            () = begun_anew(store, self.address, token) => {
                // It is deep in something that nobody wants any more.
                warn!(engine.pid = pid, "the engine is ended: the first node's has begun anew");
                true
            }
        };
        // The next one needs its memory. Of one that has ended there is nothing to kill.
        let _ = engine.process.kill().await;
        has_joined
    }
}

/// A token that an engine was started with.
struct Tried {
    token: String,
    /// When another may be; never where the nodes were joined.
    again_at: Option<Instant>,
}

impl Tried {
    fn allows(&self, token: &str) -> bool {
        self.token != token || self.again_at.is_some_and(|at| Instant::now() >= at)
    }
}

/// Waits until the first node waits for the others again, with another token than `token`.
async fn begun_anew(store: &dyn Store, address: &str, token: &str) {
    loop {
        tokio::time::sleep(LOOK).await;
        // A database that does not answer says nothing of the first node.
        if let Ok(Some(now)) = store.meeting_look(address).await
            && now != token
        {
            return;
        }
    }
}

/// This node's engine, at one time of the group; killed when dropped.
struct Engine {
    process: Child,
    /// It ends when this is closed.
    input: ChildStdin,
    /// It says a word when all nodes have come.
    output: Lines<BufReader<ChildStdout>>,
}

impl Engine {
    fn start(program: &[String], token: &str) -> io::Result<Self> {
        let mut process = Command::new(&program[0])
            .args(&program[1..])
            .env(TOKEN_VARIABLE, token)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A Ctrl-C for this process is not one for the engine: it leaves between two documents.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let no_pipe = || io::Error::other("it has no pipe");
        let input = process.stdin.take().ok_or_else(no_pipe)?;
        let output = BufReader::new(process.stdout.take().ok_or_else(no_pipe)?).lines();
        Ok(Self { process, input, output })
    }

    /// Waits for its end, or has it end when told to stop. Whether the nodes were joined.
    async fn run(&mut self, grace: Duration, shutdown: &Shutdown) -> bool {
        let has_joined = tokio::select! {
            word = self.output.next_line() => word.is_ok_and(|word| word.is_some()),
            () = shutdown.draining() => false,
        };
        if has_joined {
            info!(engine.pid = self.process.id(), "the nodes are joined");
        }
        let pid = self.process.id();
        tokio::select! {
            ended = self.process.wait() => say_end(pid, &ended, has_joined),
            // Nobody counts on it yet if the nodes are not joined.
            () = shutdown.draining() => if has_joined { self.leave(grace, shutdown).await },
        }
        has_joined
    }

    /// Has it leave between two documents.
    async fn leave(&mut self, grace: Duration, shutdown: &Shutdown) {
        let pid = self.process.id();
        info!(
            engine.pid = pid,
            node.grace_s = grace.as_secs(),
            "the engine is to leave after the document that it is at"
        );
        // One that does not listen has ended.
        let _ = self.input.write_all(b"leave\n").await;
        tokio::select! {
            _ = self.process.wait() => info!(engine.pid = pid, "the engine has left"),
            () = tokio::time::sleep(grace) => warn!(engine.pid = pid, "the engine is ended in the middle of a document"),
            () = shutdown.stopping() => warn!(engine.pid = pid, "the engine is ended at once"),
        }
    }
}

fn say_end(pid: Option<u32>, ended: &io::Result<ExitStatus>, has_joined: bool) {
    match ended {
        Ok(status) if status.success() => info!(engine.pid = pid, "the first node has no more to do"),
        Ok(status) if has_joined => {
            warn!(engine.pid = pid, engine.status = %status, "the engine ended; the next one is started when the first node waits again");
        }
        Ok(status) => warn!(engine.pid = pid, engine.status = %status, "the engine ended before the nodes were joined"),
        Err(error) => warn!(engine.pid = pid, error.message = %error, "the engine's end is not known"),
    }
}
