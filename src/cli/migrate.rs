//! `apbd migrate`: brings a PostgreSQL schema up to date, as its owner and apart from serving.

use crate::job::retry::RetryPolicy;
use crate::store::{self, Access, Roles, StoreUrl};

use super::database::DatabaseArgs;
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
}

impl Args {
    /// Migrates, and says from which version to which.
    pub fn execute(self) -> Result<Status, CliError> {
        let url = self.database.url()?;
        let roles = Roles { app: self.app_role, reporter: self.reporter_role };
        runtime()?.block_on(async {
            if let StoreUrl::Sqlite(_) = &url {
                if roles != Roles::default() {
                    return Err(CliError::Usage(format!("{url}: a SQLite file has no roles")));
                }
                // Its worker brings a file up to date; this is one that does nothing else.
                store::open(&url, Access::Worker, RetryPolicy::default()).await?.close().await;
                return print(&format!("{url}: the schema is up to date\n"));
            }
            let migrated = store::migrate(&url, &roles).await?;
            print(&if migrated.from == migrated.to {
                format!("{url}: the schema is up to date (version {})\n", migrated.to)
            } else {
                format!("{url}: schema migrated from version {} to {}\n", migrated.from, migrated.to)
            })
        })?;
        Ok(Status::Done)
    }
}
