//! What drop folders remember.
//!
//! Invariant: a row changes its state only together with its version, or as long as it has the version that is named.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{SqliteStore, now};
use crate::job::Digest;
use crate::job::clean::clean;
use crate::store::{DropFile, DropMark, DropSighting, DropStore, EndedFile, ReadyFiles, StoreError};

/// A file that is long known is written once an hour, so that a look at a settled folder hardly writes.
const SEEN: &str = concat!(
    "INSERT INTO drop_files AS f (place, file, is_sidecar, uri, version, etag, size_bytes, fault, state, since, seen_at) ",
    "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 'settling', ",
    now!(),
    ", ",
    now!(),
    ") ON CONFLICT (place, file, is_sidecar) DO UPDATE SET seen_at = excluded.seen_at, ",
    "since = CASE WHEN f.version = excluded.version THEN f.since ELSE excluded.since END, ",
    "state = CASE WHEN f.version = excluded.version THEN f.state ELSE 'settling' END, ",
    "job_id = CASE WHEN f.version = excluded.version THEN f.job_id END, ",
    "fault = CASE WHEN f.version = excluded.version THEN f.fault ELSE excluded.fault END, ",
    "uri = excluded.uri, version = excluded.version, etag = excluded.etag, size_bytes = excluded.size_bytes ",
    "WHERE f.version <> excluded.version OR f.state = 'settling' OR f.seen_at < excluded.seen_at - 3600000"
);

const READY: &str = "\
SELECT d.file, d.uri, d.version, d.etag, d.size_bytes, d.fault, s.uri AS sidecar \
FROM drop_files d LEFT JOIN drop_files s ON s.place = d.place AND s.file = d.file AND s.is_sidecar \
WHERE d.place = $1 AND NOT d.is_sidecar AND d.state = 'settling' AND d.seen_at >= d.since + $2 \
      AND (s.file IS NULL OR s.seen_at >= s.since + $2) AND (NOT $3 OR s.file IS NOT NULL OR d.fault IS NOT NULL) AND d.file > $4 \
ORDER BY d.file LIMIT $5";

const MARK: &str = "\
UPDATE drop_files SET state = $4, job_id = coalesce($5, job_id), fault = coalesce($6, fault) \
WHERE place = $1 AND file = $2 AND NOT is_sidecar AND version = $3";

const ENDED: &str = "\
SELECT d.file, d.uri, d.version, d.etag, d.size_bytes, d.fault, s.uri AS sidecar, j.state \
FROM drop_files d LEFT JOIN jobs j ON j.job_id = d.job_id \
     LEFT JOIN drop_files s ON s.place = d.place AND s.file = d.file AND s.is_sidecar \
WHERE d.place = $1 AND NOT d.is_sidecar AND d.state IN ('taken', 'rejected') AND d.file > $2 \
      AND (d.state = 'rejected' OR j.state IN ('succeeded', 'failed', 'cancelled')) \
ORDER BY d.file LIMIT $3";

#[async_trait]
impl DropStore for SqliteStore {
    async fn drop_seen(&self, place: &str, sightings: &[DropSighting]) -> Result<(), StoreError> {
        let mut transaction = self.begin("drop_seen").await?;
        for seen in sightings {
            sqlx::query(SEEN)
                .bind(clean(place))
                .bind(seen.file.to_string())
                .bind(seen.is_sidecar)
                .bind(clean(&seen.uri))
                .bind(clean(&seen.version))
                .bind(seen.etag.as_deref().map(clean))
                .bind(seen.size_bytes as i64)
                .bind(seen.fault.as_deref().map(clean))
                .execute(&mut *transaction)
                .await
                .map_err(|error| self.error("drop_seen", error))?;
        }
        self.commit("drop_seen", transaction).await
    }

    async fn drop_ready(&self, place: &str, which: &ReadyFiles) -> Result<Vec<DropFile>, StoreError> {
        let rows = sqlx::query(READY)
            .bind(clean(place))
            .bind(which.settle.as_millis() as i64)
            .bind(which.with_sidecar)
            .bind(which.after.map(|digest| digest.to_string()).unwrap_or_default())
            .bind(i64::from(which.limit))
            .fetch_all(&self.pool)
            .await
            .map_err(|error| self.error("drop_ready", error))?;
        rows.iter().map(|row| self.drop_file("drop_ready", row)).collect()
    }

    async fn drop_mark(&self, place: &str, marks: &[DropMark]) -> Result<(), StoreError> {
        let mut transaction = self.begin("drop_mark").await?;
        for mark in marks {
            sqlx::query(MARK)
                .bind(clean(place))
                .bind(mark.file.to_string())
                .bind(clean(&mark.version))
                .bind(mark.fate.state())
                .bind(mark.fate.job().map(|job| job.to_string()))
                .bind(mark.fate.reason().map(clean))
                .execute(&mut *transaction)
                .await
                .map_err(|error| self.error("drop_mark", error))?;
        }
        self.commit("drop_mark", transaction).await
    }

    async fn drop_ended(&self, place: &str, after: Option<Digest>, limit: u32) -> Result<Vec<EndedFile>, StoreError> {
        let after = after.map(|digest| digest.to_string()).unwrap_or_default();
        let query = sqlx::query(ENDED).bind(clean(place)).bind(after).bind(i64::from(limit));
        let rows = query.fetch_all(&self.pool).await.map_err(|error| self.error("drop_ended", error))?;
        let ended = |row: &SqliteRow| {
            let state = row.get::<Option<String>, _>("state").map(|text| self.parsed("drop_ended", "state", text));
            Ok(EndedFile { file: self.drop_file("drop_ended", row)?, state: state.transpose()? })
        };
        rows.iter().map(ended).collect()
    }

    async fn drop_forget(&self, place: &str, unseen: Duration) -> Result<u64, StoreError> {
        let sql = concat!("DELETE FROM drop_files WHERE place = $1 AND seen_at < ", now!(), " - $2");
        let query = sqlx::query(sql).bind(clean(place)).bind(unseen.as_millis() as i64);
        let deleted = query.execute(&self.pool).await;
        deleted.map(|done| done.rows_affected()).map_err(|error| self.error("drop_forget", error))
    }
}

impl SqliteStore {
    fn drop_file(&self, operation: &'static str, row: &SqliteRow) -> Result<DropFile, StoreError> {
        Ok(DropFile {
            file: self.parsed(operation, "file", row.get::<String, _>("file"))?,
            uri: row.get("uri"),
            version: row.get("version"),
            etag: row.get("etag"),
            size_bytes: row.get::<i64, _>("size_bytes").unsigned_abs(),
            fault: row.get("fault"),
            sidecar: row.get("sidecar"),
        })
    }
}
