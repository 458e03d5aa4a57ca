//! Results on their way to files.
//!
//! Invariant: a note goes when the ending it was made for, and no later one, has been written.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{Row, Sqlite, Transaction};

use super::{SqliteStore, now};
use crate::job::Attempt;
use crate::store::exports::WANTED_FOR;
use crate::store::{Export, ExportStore, Lease, StoreError};

const WANT: &str = concat!(
    "INSERT INTO export_places AS p (place, seen_at) VALUES ($1, ",
    now!(),
    ") ON CONFLICT (place) DO UPDATE SET seen_at = excluded.seen_at WHERE p.seen_at < excluded.seen_at - 3600000"
);

const NOTE: &str = concat!(
    "INSERT INTO exports (place, job_id, attempt, available_at) SELECT place, $1, $2, ",
    now!(),
    " FROM export_places WHERE seen_at > ",
    now!(),
    " - $3 ON CONFLICT (place, job_id) DO UPDATE SET attempt = excluded.attempt, available_at = excluded.available_at"
);

const TAKE: &str = concat!(
    "UPDATE exports SET available_at = ",
    now!(),
    " + $3 WHERE place = $1 AND job_id IN (SELECT job_id FROM exports WHERE place = $1 AND available_at <= ",
    now!(),
    " ORDER BY available_at LIMIT $2) RETURNING job_id, attempt"
);

#[async_trait]
impl ExportStore for SqliteStore {
    async fn export_want(&self, place: &str) -> Result<(), StoreError> {
        let wanted = sqlx::query(WANT).bind(place).execute(&self.pool).await;
        wanted.map(drop).map_err(|error| self.error("export_want", error))
    }

    async fn export_take(&self, place: &str, limit: u32, lease: Duration) -> Result<Vec<Export>, StoreError> {
        let query = sqlx::query(TAKE).bind(place).bind(i64::from(limit)).bind(lease.as_millis() as i64);
        let rows = query.fetch_all(&self.pool).await.map_err(|error| self.error("export_take", error))?;
        let export = |row: &sqlx::sqlite::SqliteRow| {
            let job = self.parsed("export_take", "job_id", row.get::<String, _>("job_id"))?;
            Ok(Export { job, attempt: Attempt::new(row.get::<i64, _>("attempt") as u32) })
        };
        rows.iter().map(export).collect()
    }

    async fn export_done(&self, place: &str, export: Export) -> Result<(), StoreError> {
        let sql = "DELETE FROM exports WHERE place = $1 AND job_id = $2 AND attempt = $3";
        let query = sqlx::query(sql).bind(place).bind(export.job.to_string()).bind(i64::from(export.attempt.get()));
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("export_done", error))
    }
}

impl SqliteStore {
    /// Part of the transaction that ends a job.
    pub(super) async fn note_exports(
        &self,
        transaction: &mut Transaction<'_, Sqlite>,
        lease: Lease,
    ) -> Result<(), StoreError> {
        let query = sqlx::query(NOTE).bind(lease.job.to_string()).bind(i64::from(lease.attempt.get()));
        let query = query.bind(WANTED_FOR.as_millis() as i64);
        query.execute(&mut **transaction).await.map(drop).map_err(|error| self.error("finish", error))
    }
}
