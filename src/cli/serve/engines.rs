//! How the engine of each group of the pool is run: this program again, told which devices are its own.
//!
//! Invariant: what is not said in the configuration is left to the engine's own defaults.

use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;
use tracing::info;
use uuid::Uuid;

use crate::cli::CliError;
use crate::cli::place::TOKEN_VARIABLE;
use crate::config::{EngineConfig, GroupConfig, NodesConfig};
use crate::store::Store;
use crate::supervise::{EngineOptions, PoolGroup, Prepare, Prepared};

/// The groups, with what their engines are started by; `model` is that of groups that name none. Called in the runtime.
pub(super) fn groups(config: &EngineConfig, model: &Path, store: &Arc<dyn Store>) -> Result<Vec<PoolGroup>, CliError> {
    let group = |group: &GroupConfig| {
        let options = EngineOptions {
            group: group.name.clone(),
            program: program(config, group, model)?,
            prepare: group.nodes.as_ref().map(|nodes| announced(&group.name, nodes, config, store)),
            start_within: config.start_within,
            silence_floor: config.silence_floor,
            silence_factor: config.silence_factor,
        };
        Ok(PoolGroup { ranks: group.ranks, options })
    };
    config.groups.iter().map(group).collect()
}

/// Every start of the engine on the first of several nodes says where it waits for the others, and has a token of its own.
fn announced(group: &str, nodes: &NodesConfig, config: &EngineConfig, store: &Arc<dyn Store>) -> Prepare {
    let (group, nodes, store, runtime) = (group.to_owned(), nodes.clone(), store.clone(), Handle::current());
    let valid_for = config.start_within.max(nodes.within);
    Prepare(Arc::new(move || {
        let token = Uuid::new_v4().simple().to_string();
        runtime
            .block_on(store.meeting_say(&nodes.address, &token, valid_for))
            .map_err(|error| format!("the other nodes could not be told where to meet: {error}"))?;
        info!(
            engine.group = group,
            engine.nodes = nodes.count,
            node.hub = nodes.address,
            "the other nodes are waited for"
        );
        Ok(Prepared { arguments: place(&nodes, 0), environment: vec![(TOKEN_VARIABLE.to_owned(), token)] })
    }))
}

/// An engine's arguments on one of several nodes.
pub(in crate::cli) fn place(nodes: &NodesConfig, node: usize) -> Vec<String> {
    let mut arguments = vec![format!("--nodes={}", nodes.count), format!("--node={node}")];
    arguments.push(format!("--hub={}", nodes.address));
    arguments.push(format!("--hub-start-s={}", nodes.within.as_secs()));
    if node == 0 {
        arguments.push(format!("--hub-listen={}", nodes.listen));
    }
    arguments
}

/// Program and arguments of a group's engine.
pub(in crate::cli) fn program(
    config: &EngineConfig,
    group: &GroupConfig,
    model: &Path,
) -> Result<Vec<String>, CliError> {
    if !group.command.is_empty() {
        return Ok(group.command.clone());
    }
    let own = std::env::current_exe().map_err(|error| CliError::Internal(format!("own program: {error}")))?;
    let text = |path: &Path| path.display().to_string();
    let model = group.model.as_deref().unwrap_or(model);
    let mut program = vec![text(&own), "engine".to_owned()];
    let mut option = |name: &str, value: String| program.extend([format!("--{name}"), value]);
    option("model", text(model));
    option("backend", group.backend.clone());
    option("kv-cache", config.kv_cache.clone());
    option("ranks", group.ranks.to_string());
    if let Some(heads) = &config.heads {
        option("heads", text(heads));
    }
    if let Some(threads) = group.threads {
        option("threads", threads.to_string());
    }
    if !group.gpus.is_empty() {
        let gpus: Vec<String> = group.gpus.iter().map(ToString::to_string).collect();
        option("devices", gpus.join(","));
    }
    Ok(program)
}
