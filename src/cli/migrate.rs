//! `apbd migrate`: brings a PostgreSQL schema up to date, as its owner and apart from serving.

use crate::job::retry::RetryPolicy;
use crate::store::{self, Access, Roles, StoreUrl};

use super::database::{DatabaseArgs, Format, print_json};
use super::{CliError, Status, print, runtime};

/// Arguments of `apbd migrate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Role that daemons work as: gets the right to read and write rows. Made, without login, if it is missing.
    #[arg(long, value_name = "ROLE")]
    app_role: Option<String>,
    /// Role that people report as: gets the right to read the report_ views alone. Made, without login, if it is missing.
    #[arg(long, value_name = "ROLE")]
    reporter_role: Option<String>,
    /// How to say what was done.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Migrates, and says from which version to which.
    pub fn execute(self) -> Result<Status, CliError> {
        let url = self.database.url()?;
        let roles = Roles { app: self.app_role, reporter: self.reporter_role };
        let migrated = runtime()?.block_on(async {
            match &url {
                StoreUrl::Sqlite(_) if roles != Roles::default() => {
                    Err(CliError::Usage(format!("{url}: a SQLite file has no roles")))
                }
                StoreUrl::Sqlite(_) => {
                    // Its worker brings a file up to date; this is one that does nothing else.
                    store::open(&url, Access::Worker, RetryPolicy::default()).await?.close().await;
                    Ok(None)
                }
                StoreUrl::Postgres(_) => Ok(Some(store::migrate(&url, &roles).await?)),
            }
        })?;
        let (from, to) = (migrated.map(|migrated| migrated.from), migrated.map(|migrated| migrated.to));
        match (self.format, migrated) {
            (Format::Json, _) => {
                print_json(&serde_json::json!({ "database": url.to_string(), "from": from, "to": to }))?
            }
            (Format::Table, None) => print(&format!("{url}: the schema is up to date\n"))?,
            (Format::Table, Some(migrated)) if migrated.from == migrated.to => {
                print(&format!("{url}: the schema is up to date (version {})\n", migrated.to))?;
            }
            (Format::Table, Some(migrated)) => {
                print(&format!("{url}: schema migrated from version {} to {}\n", migrated.from, migrated.to))?;
            }
        }
        Ok(Status::Done)
    }
}
