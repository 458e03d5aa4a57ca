//! Which database a subcommand looks at, and how what it finds is printed.
//!
//! Invariant: a password in the database's URL is never printed.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::job::retry::RetryPolicy;
use crate::store::{self, Access, Store, StoreError, StoreUrl};

use super::{CliError, print};

/// Where the jobs are.
#[derive(Debug, clap::Args)]
pub struct DatabaseArgs {
    /// Database of the jobs: a SQLite file or postgres://USER@HOST/DATABASE.
    #[arg(long = "db", alias = "database-url", value_name = "URL", env = "APBD_DATABASE_URL", hide_env_values = true)]
    url: Option<String>,
    /// File that holds the database's URL.
    #[arg(long, value_name = "FILE", env = "APBD_DATABASE_URL_FILE", conflicts_with = "url")]
    db_file: Option<PathBuf>,
}

impl DatabaseArgs {
    /// The place named, or the file that `apbd run` uses in this folder.
    pub fn url(&self) -> Result<StoreUrl, CliError> {
        let text = match (&self.url, &self.db_file) {
            (Some(url), _) => url.clone(),
            (None, Some(file)) => fs::read_to_string(file)
                .map_err(|error| CliError::Usage(format!("{}: {error}", file.display())))?
                .trim()
                .to_owned(),
            (None, None) => return Ok(StoreUrl::default()),
        };
        text.parse().map_err(CliError::from)
    }

    /// Opens it to look, enqueue or cancel.
    pub async fn open(&self) -> Result<Arc<dyn Store>, CliError> {
        Ok(store::open(&self.url()?, Access::Client, RetryPolicy::default()).await?)
    }
}

impl From<StoreError> for CliError {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Url { .. } | StoreError::File { .. } | StoreError::Schema { .. } => Self::Usage(message),
            StoreError::Unavailable { .. } | StoreError::InUse { .. } => Self::Unavailable(message),
            StoreError::Refused { .. } | StoreError::Corrupt { .. } => Self::Internal(message),
        }
    }
}

/// For people or for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns.
    Table,
    /// One JSON value.
    Json,
}

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Internal(error.to_string()))?;
    print(&format!("{text}\n"))
}

/// Prints rows as wide as the terminal allows.
pub fn print_table(columns: &[impl AsRef<str>], rows: Vec<Vec<String>>) -> Result<(), CliError> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(columns.iter().map(|column| column.as_ref().to_uppercase()));
    table.add_rows(rows);
    print(&format!("{}\n", table.trim_fmt()))
}

/// A value of a report, or nothing.
pub fn cell(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:.1}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}
