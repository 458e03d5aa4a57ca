//! The schema: bringing it up to date, and the rights of those who use it.
//!
//! Invariant: run by the owner of the tables, apart from serving; two at the same time wait for each other.

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{AssertSqlSafe, Connection};

use super::{MIGRATIONS, PostgresStore, connect_options, error};
use crate::store::{ReportView, StoreError, StoreUrl};

/// Roles that get rights; made (without login) where they are missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// Works: reads and writes rows, changes no table.
    pub app: Option<String>,
    /// Reports: reads the `report_` views and nothing else.
    pub reporter: Option<String>,
}

/// What a migration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Migrated {
    /// Version before; 0: there was no schema.
    pub from: i64,
    /// Version now.
    pub to: i64,
}

/// Brings the schema of the database at `url` up to date and gives `roles` their rights.
pub async fn migrate(url: &StoreUrl, roles: &Roles) -> Result<Migrated, StoreError> {
    let place = url.to_string();
    let failed = |source| error::classified(&place, "migrate", source);
    // No limits here: an index on a large table takes its time.
    let options = connect_options(url)?.options([("statement_timeout", "0"), ("lock_timeout", "0")]);
    let mut connection = PgConnection::connect_with(&options).await.map_err(failed)?;
    let from = version(&mut connection).await.map_err(failed)?.unwrap_or(0);
    MIGRATIONS.run(&mut connection).await.map_err(|error| match error {
        sqlx::migrate::MigrateError::Execute(source) => failed(source),
        other => StoreError::Schema { place: place.clone(), reason: other.to_string() },
    })?;
    grant(&mut connection, roles).await.map_err(failed)?;
    let to = version(&mut connection).await.map_err(failed)?.unwrap_or(0);
    connection.close().await.map_err(failed)?;
    Ok(Migrated { from, to })
}

/// The newest migration that was made, or `None` where there is no schema.
async fn version(connection: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
    let there: bool =
        sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(&mut *connection).await?;
    if !there {
        return Ok(None);
    }
    let newest = "SELECT max(version) FROM _sqlx_migrations WHERE success";
    sqlx::query_scalar(newest).fetch_one(connection).await
}

async fn grant(connection: &mut PgConnection, roles: &Roles) -> Result<(), sqlx::Error> {
    let tables = "jobs, attempts, documents, results, outbox, rejections, drop_files, export_places, exports, endings_hourly, stage_times, learned_rates";
    let views = ReportView::ALL.map(|view| format!("report_{}", view.as_str())).join(", ");
    let mut statements = Vec::new();
    for role in [&roles.app, &roles.reporter].into_iter().flatten() {
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)")
            .bind(role)
            .fetch_one(&mut *connection)
            .await?;
        if !there {
            statements.push(format!("CREATE ROLE {} NOLOGIN", quoted(role)));
        }
        let schema: String = sqlx::query_scalar("SELECT current_schema()").fetch_one(&mut *connection).await?;
        statements.push(format!("GRANT USAGE ON SCHEMA {} TO {}", quoted(&schema), quoted(role)));
        statements.push(format!("GRANT SELECT ON {views} TO {}", quoted(role)));
    }
    if let Some(app) = &roles.app {
        statements.push(format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {}", quoted(app)));
        statements.push(format!("GRANT SELECT ON _sqlx_migrations TO {}", quoted(app)));
    }
    for statement in statements {
        sqlx::query(AssertSqlSafe(statement)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// A name as SQL has it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

impl PostgresStore {
    pub(super) async fn check_schema(&self) -> Result<(), StoreError> {
        let schema = |reason| StoreError::Schema { place: self.place.clone(), reason };
        let mut connection = self.connection().await?;
        let version = version(&mut connection).await.map_err(|error| self.error("check", error))?;
        let expected = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0);
        match version {
            Some(version) if version == expected => Ok(()),
            Some(version) if version > expected => {
                Err(schema(format!("its schema has version {version}, newer than this program's {expected}")))
            }
            Some(version) => Err(schema(format!(
                "its schema has version {version}, this program needs {expected}: run apbd migrate"
            ))),
            None => Err(schema("it has no tables of apbd yet: run apbd migrate".to_owned())),
        }
    }

    /// A connection of the pool. One that can not be had is tried once more on its own, since the pool says only that it waited.
    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, StoreError> {
        match self.pool.acquire().await {
            Ok(connection) => Ok(connection),
            Err(sqlx::Error::PoolTimedOut) => Err(match reason(&self.pool).await {
                Some(error) => self.error("connect", error),
                None => self.error("connect", sqlx::Error::PoolTimedOut),
            }),
            Err(error) => Err(self.error("connect", error)),
        }
    }
}

/// Why no connection can be made.
async fn reason(pool: &PgPool) -> Option<sqlx::Error> {
    let options = (*pool.connect_options()).clone();
    let tried = tokio::time::timeout(Duration::from_secs(2), PgConnection::connect_with(&options)).await;
    tried.ok().and_then(Result::err)
}
