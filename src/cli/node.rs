//! `apbd node`: another node than the first of a group on several. It takes no jobs: its engine does what the first node's decides.
//!
//! The first node's daemon says in the database that its engine waits; this one then starts its own, and again whenever the first is started again.
//!
//! Invariant: an engine's token is used once: what it was good for is over when the engine has ended.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tracing::{info, warn};

use super::place::TOKEN_VARIABLE;
use super::run::model;
use super::serve::{engines, load};
use super::{CliError, Status, runtime};
use crate::config::{Config, GroupConfig, NodesConfig};
use crate::pipeline::shutdown::{self, Phase, Shutdown};
use crate::store::{self, Access, Store};

/// Between two looks whether the first node waits.
const LOOK: Duration = Duration::from_secs(1);

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
            let store = store::open(&config.database, Access::Client, config.work.retry).await?;
            follow(&*store, &nodes.address, &program, &shutdown).await;
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

/// Has an engine at work whenever the first node waits for one.
async fn follow(store: &dyn Store, address: &str, program: &[String], shutdown: &Shutdown) {
    let mut used = None;
    info!(node.hub = address, "waiting for the first node");
    loop {
        match store.meeting_look(address).await {
            Ok(Some(token)) if used.as_ref() != Some(&token) => {
                tokio::select! {
                    () = shutdown.draining() => return,
                    () = work(program, &token) => {}
                    // Its engine is deep in something that nobody wants any more; it is killed with this.
                    () = begun_anew(store, address, &token) => warn!("the engine is ended: the first node's has begun anew"),
                }
                used = Some(token);
            }
            Ok(_) => {}
            Err(error) => warn!(error.message = %error, "the database does not say where to meet"),
        }
        tokio::select! {
            () = shutdown.draining() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
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

/// Runs an engine to its end.
async fn work(program: &[String], token: &str) {
    let started = Command::new(&program[0])
        .args(&program[1..])
        .env(TOKEN_VARIABLE, token)
        // It ends when this process does.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match started {
        Ok(mut engine) => {
            info!(engine.pid = engine.id(), "the engine is started");
            let input = engine.stdin.take();
            let ended = engine.wait().await;
            drop(input);
            match ended {
                Ok(status) if status.success() => info!("the first node has no more to do"),
                Ok(status) => warn!(engine.status = %status, "the engine ended; the first node's is started anew"),
                Err(error) => warn!(error.message = %error, "the engine's end is not known"),
            }
        }
        Err(error) => warn!(error.message = %error, program = program[0], "the engine could not be started"),
    }
}
