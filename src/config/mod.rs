//! The configuration of the daemon: a TOML file and the environment, checked as a whole.
//!
//! Invariant: a [`Config`] is complete and consistent; everything that is wrong is said at once, before anything is connected to. No secret
//! is in a message or in `Debug`.

mod checked;
mod groups;
mod places;
mod raw;

use std::collections::BTreeMap;
use std::path::Path;

pub use checked::{AmqpConfig, Config, EngineConfig, WorkConfig};
pub use groups::{GroupConfig, NodesConfig};

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used:\n  {}", faults.join("\n  "))]
pub struct ConfigError {
    /// One line each: where, what, what to do.
    pub faults: Vec<String>,
}

impl Config {
    /// Reads `path`, with what `environment` says in its place (`APBD_AMQP_URL` for `url` in `[amqp]`).
    pub fn load(path: &Path, environment: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let one = |fault: String| ConfigError { faults: vec![fault] };
        let text = std::fs::read_to_string(path).map_err(|error| one(format!("{}: {error}", path.display())))?;
        Self::parse(&text, environment)
    }

    /// As [`load`](Self::load), of a text.
    pub fn parse(text: &str, environment: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let mut faults = Vec::new();
        let raw = raw::Raw::read(text, environment, &mut faults);
        let config = checked::check(raw, &mut faults);
        match config {
            Some(config) if faults.is_empty() => Ok(config),
            _ => Err(ConfigError { faults }),
        }
    }
}

#[cfg(test)]
mod tests;
