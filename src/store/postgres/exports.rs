//! Results on their way to files.
//!
//! Invariant: a note goes when the ending it was made for, and no later one, has been written.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{Postgres, Row, Transaction};
use uuid::Uuid;

use super::PostgresStore;
use super::rows::interval;
use crate::job::Attempt;
use crate::store::exports::WANTED_FOR;
use crate::store::{Export, ExportStore, Lease, StoreError};

/// Written once an hour, not at every look.
const WANT: &str = "\
INSERT INTO export_places AS p (place, seen_at) VALUES ($1, now()) \
ON CONFLICT (place) DO UPDATE SET seen_at = now() WHERE p.seen_at < now() - interval '1 hour'";

const NOTE: &str = "\
INSERT INTO exports (place, job_id, attempt, available_at) SELECT place, $1, $2, now() FROM export_places WHERE seen_at > now() - $3 \
ON CONFLICT (place, job_id) DO UPDATE SET attempt = excluded.attempt, available_at = excluded.available_at";

const TAKE: &str = "\
UPDATE exports SET available_at = clock_timestamp() + $3 \
WHERE place = $1 AND job_id IN (SELECT job_id FROM exports WHERE place = $1 AND available_at <= now() ORDER BY available_at LIMIT $2 \
                                FOR UPDATE SKIP LOCKED) \
RETURNING job_id, attempt";

#[async_trait]
impl ExportStore for PostgresStore {
    async fn export_want(&self, place: &str) -> Result<(), StoreError> {
        let wanted = sqlx::query(WANT).bind(place).execute(&self.pool).await;
        wanted.map(drop).map_err(|error| self.error("export_want", error))
    }

    async fn export_take(&self, place: &str, limit: u32, lease: Duration) -> Result<Vec<Export>, StoreError> {
        let query = sqlx::query(TAKE).bind(place).bind(i64::from(limit)).bind(interval(lease));
        let rows = query.fetch_all(&self.pool).await.map_err(|error| self.error("export_take", error))?;
        let export = |row: &sqlx::postgres::PgRow| Export {
            job: row.get::<Uuid, _>("job_id").into(),
            attempt: Attempt::new(row.get::<i32, _>("attempt").unsigned_abs()),
        };
        Ok(rows.iter().map(export).collect())
    }

    async fn export_done(&self, place: &str, export: Export) -> Result<(), StoreError> {
        let sql = "DELETE FROM exports WHERE place = $1 AND job_id = $2 AND attempt = $3";
        let query = sqlx::query(sql).bind(place).bind(export.job.uuid()).bind(export.attempt.get() as i32);
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("export_done", error))
    }
}

impl PostgresStore {
    /// Part of the transaction that ends a job.
    pub(super) async fn note_exports(
        &self,
        transaction: &mut Transaction<'_, Postgres>,
        lease: Lease,
    ) -> Result<(), StoreError> {
        let query =
            sqlx::query(NOTE).bind(lease.job.uuid()).bind(lease.attempt.get() as i32).bind(interval(WANTED_FOR));
        query.execute(&mut **transaction).await.map(drop).map_err(|error| self.error("finish", error))
    }
}
