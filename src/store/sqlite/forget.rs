//! Forgetting what ended long ago.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use sqlx::AssertSqlSafe;

use super::{SqliteStore, now};
use crate::store::StoreError;
use crate::store::exports::WANTED_FOR;
use crate::store::forget::{ForgetStore, Forgotten, TABLES};

/// `$3`: how long after a place or a folder was last heard of somebody will come for what is noted for it.
const OLD: &str = concat!(
    "SELECT job_id FROM jobs WHERE state IN ('succeeded', 'failed', 'cancelled') AND finished_at <= ",
    now!(),
    " - $1 AND job_id NOT IN (SELECT job_id FROM outbox WHERE given_up IS NULL) ",
    "AND job_id NOT IN (SELECT job_id FROM exports JOIN export_places USING (place) WHERE seen_at > ",
    now!(),
    " - $3) AND job_id NOT IN (SELECT job_id FROM drop_files WHERE state = 'taken' AND NOT is_sidecar AND job_id IS NOT NULL AND seen_at > ",
    now!(),
    " - $3) ORDER BY enqueued_at LIMIT $2"
);

const REJECTIONS: &str = concat!(
    "DELETE FROM rejections WHERE rowid IN (SELECT rowid FROM rejections WHERE rejected_at <= ",
    now!(),
    " - $1 LIMIT $2)"
);

#[async_trait]
impl ForgetStore for SqliteStore {
    async fn forget(&self, age: Duration, limit: u32) -> Result<Forgotten, StoreError> {
        let error = |error| self.error("forget", error);
        let mut transaction = self.begin("forget").await?;
        let old = sqlx::query_scalar(OLD)
            .bind(age.as_millis() as i64)
            .bind(i64::from(limit))
            .bind(WANTED_FOR.as_millis() as i64);
        let old: Vec<String> = old.fetch_all(&mut *transaction).await.map_err(error)?;
        let jobs = json!(old).to_string();
        for table in TABLES {
            let delete =
                AssertSqlSafe(format!("DELETE FROM {table} WHERE job_id IN (SELECT value FROM json_each($1))"));
            sqlx::query(delete).bind(&jobs).execute(&mut *transaction).await.map_err(error)?;
        }
        let rejections = sqlx::query(REJECTIONS).bind(age.as_millis() as i64).bind(i64::from(limit));
        let rejections = rejections.execute(&mut *transaction).await.map_err(error)?.rows_affected();
        self.commit("forget", transaction).await?;
        Ok(Forgotten { jobs: old.len() as u64, rejections })
    }
}
