//! Logs: one subscriber on stderr, for people on a terminal and as JSON otherwise.
//!
//! Invariant: nothing here, and no event anywhere, carries document text or a secret.

pub mod console;
pub mod health;
pub mod http;
pub mod metrics;

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

/// Options of the log, the same for every subcommand.
#[derive(Debug, Clone, clap::Args)]
pub struct LogOptions {
    /// What is logged: a level, or `target=level,…`.
    #[arg(
        id = "log_filter",
        long = "log",
        env = "APBD_LOG",
        default_value = "warn",
        value_name = "FILTER",
        global = true
    )]
    pub filter: String,
    /// Form of the log; by default for people on a terminal, JSON otherwise.
    #[arg(id = "log_format", long = "log-format", env = "APBD_LOG_FORMAT", value_name = "FORM", global = true)]
    pub format: Option<LogFormat>,
}

/// Form of the log on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter {filter:?}: {reason}; write a level (error, warn, info, debug, trace) or target=level,…")]
    Filter { filter: String, reason: String },
}

/// Installs the subscriber. A second call in one process changes nothing.
pub fn init(options: &LogOptions) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(&options.filter)
        .map_err(|error| TelemetryError::Filter { filter: options.filter.clone(), reason: error.to_string() })?;
    let human = match options.format {
        Some(format) => format == LogFormat::Human,
        None => stderr().is_terminal(),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(console::LogWriter::new);
    // Only tests install twice, and for them the first subscriber is as good.
    let _ = if human {
        builder.with_ansi(stderr().is_terminal()).with_target(false).compact().try_init()
    } else {
        builder.json().flatten_event(true).with_current_span(false).try_init()
    };
    Ok(())
}
