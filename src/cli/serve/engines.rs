//! How the engine of each group of the pool is run: this program again, told which devices are its own.
//!
//! Invariant: what is not said in the configuration is left to the engine's own defaults.

use std::path::Path;

use crate::cli::CliError;
use crate::config::{EngineConfig, GroupConfig};
use crate::supervise::{EngineOptions, PoolGroup};

/// The groups, with what their engines are started by; `model` is that of groups that name none.
pub(super) fn groups(config: &EngineConfig, model: &Path) -> Result<Vec<PoolGroup>, CliError> {
    let group = |group: &GroupConfig| {
        let options = EngineOptions {
            group: group.name.clone(),
            program: program(config, group, model)?,
            start_within: config.start_within,
            silence_floor: config.silence_floor,
            silence_factor: config.silence_factor,
        };
        Ok(PoolGroup { ranks: group.ranks, options })
    };
    config.groups.iter().map(group).collect()
}

fn program(config: &EngineConfig, group: &GroupConfig, model: &Path) -> Result<Vec<String>, CliError> {
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
