//! Logs: one subscriber on stderr, for people on a terminal and as JSON otherwise.
//!
//! Invariant: nothing here, and no event anywhere, carries document text or a secret.

pub mod console;
pub mod health;
pub mod http;
pub mod metrics;

use std::io::{IsTerminal, stderr};

use tracing::{Level, Metadata};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

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
    let layer = tracing_subscriber::fmt::layer().with_writer(console::LogWriter::new);
    let layer = if human {
        layer.with_ansi(stderr().is_terminal()).with_target(false).compact().boxed()
    } else {
        layer.json().flatten_event(true).with_current_span(false).boxed()
    };
    // Only tests install twice, and for them the first subscriber is as good.
    // The filters are not the layer's own: those forget an event after a library has asked in vain whether its own would be heard.
    let _ = tracing_subscriber::registry().with(filter).with(filter_fn(has_no_payload)).with(layer).try_init();
    Ok(())
}

/// What libraries say below info is what passes through them: frames with passwords, requests with their signatures, texts. No level asked for
/// brings that into a log.
fn has_no_payload(about: &Metadata<'_>) -> bool {
    about.target().split("::").next() == Some(env!("CARGO_PKG_NAME")) || *about.level() <= Level::INFO
}
