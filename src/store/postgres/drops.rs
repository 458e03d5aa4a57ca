//! What drop folders remember.
//!
//! Invariant: a row changes its state only together with its version, or as long as it has the version that is named.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PostgresStore;
use super::rows::interval;
use crate::job::Digest;
use crate::job::clean::clean;
use crate::store::{DropFile, DropMark, DropSighting, DropStore, EndedFile, ReadyFiles, StoreError};

/// A file that is long known is written once an hour, so that a look at a settled folder reads and does not write. Rows go in by
/// their key: two daemons that look at one folder wait for each other and never in a circle.
const SEEN: &str = "\
INSERT INTO drop_files AS f (place, file, is_sidecar, uri, version, etag, size_bytes, fault, state, since, seen_at) \
SELECT $1, n.*, 'settling', now(), now() \
FROM unnest($2::text[], $3::boolean[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::text[]) AS n (file, is_sidecar) \
ORDER BY file, is_sidecar \
ON CONFLICT (place, file, is_sidecar) DO UPDATE SET seen_at = now(), \
    since = CASE WHEN f.version = excluded.version THEN f.since ELSE now() END, \
    state = CASE WHEN f.version = excluded.version THEN f.state ELSE 'settling' END, \
    job_id = CASE WHEN f.version = excluded.version THEN f.job_id END, \
    fault = CASE WHEN f.version = excluded.version THEN f.fault ELSE excluded.fault END, \
    uri = excluded.uri, version = excluded.version, etag = excluded.etag, size_bytes = excluded.size_bytes \
WHERE f.version <> excluded.version OR f.state = 'settling' OR f.seen_at < now() - interval '1 hour'";

const READY: &str = "\
SELECT d.file, d.uri, d.version, d.etag, d.size_bytes, d.fault, s.uri AS sidecar \
FROM drop_files d LEFT JOIN drop_files s ON s.place = d.place AND s.file = d.file AND s.is_sidecar \
WHERE d.place = $1 AND NOT d.is_sidecar AND d.state = 'settling' AND d.seen_at >= d.since + $2 \
      AND (s.file IS NULL OR s.seen_at >= s.since + $2) AND (NOT $3 OR s.file IS NOT NULL OR d.fault IS NOT NULL) AND d.file > $4 \
ORDER BY d.file LIMIT $5";

const MARK: &str = "\
UPDATE drop_files f SET state = m.state, job_id = coalesce(m.job_id, f.job_id), fault = coalesce(m.fault, f.fault) \
FROM unnest($2::text[], $3::text[], $4::text[], $5::uuid[], $6::text[]) AS m (file, version, state, job_id, fault) \
WHERE f.place = $1 AND f.file = m.file AND NOT f.is_sidecar AND f.version = m.version";

const ENDED: &str = "\
SELECT d.file, d.uri, d.version, d.etag, d.size_bytes, d.fault, s.uri AS sidecar, j.state \
FROM drop_files d LEFT JOIN jobs j ON j.job_id = d.job_id \
     LEFT JOIN drop_files s ON s.place = d.place AND s.file = d.file AND s.is_sidecar \
WHERE d.place = $1 AND NOT d.is_sidecar AND d.state IN ('taken', 'rejected') AND d.file > $2 \
      AND (d.state = 'rejected' OR j.state IN ('succeeded', 'failed', 'cancelled')) \
ORDER BY d.file LIMIT $3";

#[async_trait]
impl DropStore for PostgresStore {
    async fn drop_seen(&self, place: &str, sightings: &[DropSighting]) -> Result<(), StoreError> {
        // One statement may touch a row once; a listing that changes meanwhile can name a file twice.
        let rows: BTreeMap<_, _> =
            sightings.iter().map(|seen| ((seen.file.to_string(), seen.is_sidecar), seen)).collect();
        sqlx::query(SEEN)
            .bind(clean(place))
            .bind(rows.keys().map(|key| key.0.as_str()).collect::<Vec<_>>())
            .bind(rows.keys().map(|key| key.1).collect::<Vec<_>>())
            .bind(rows.values().map(|seen| clean(&seen.uri)).collect::<Vec<_>>())
            .bind(rows.values().map(|seen| clean(&seen.version)).collect::<Vec<_>>())
            .bind(rows.values().map(|seen| seen.etag.as_deref().map(clean)).collect::<Vec<_>>())
            .bind(rows.values().map(|seen| seen.size_bytes as i64).collect::<Vec<_>>())
            .bind(rows.values().map(|seen| seen.fault.as_deref().map(clean)).collect::<Vec<_>>())
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|error| self.error("drop_seen", error))
    }

    async fn drop_ready(&self, place: &str, which: &ReadyFiles) -> Result<Vec<DropFile>, StoreError> {
        let rows = sqlx::query(READY)
            .bind(clean(place))
            .bind(interval(which.settle))
            .bind(which.with_sidecar)
            .bind(which.after.map(|digest| digest.to_string()).unwrap_or_default())
            .bind(i64::from(which.limit))
            .fetch_all(&self.pool)
            .await
            .map_err(|error| self.error("drop_ready", error))?;
        rows.iter().map(|row| self.drop_file("drop_ready", row)).collect()
    }

    async fn drop_mark(&self, place: &str, marks: &[DropMark]) -> Result<(), StoreError> {
        sqlx::query(MARK)
            .bind(clean(place))
            .bind(marks.iter().map(|mark| mark.file.to_string()).collect::<Vec<_>>())
            .bind(marks.iter().map(|mark| clean(&mark.version)).collect::<Vec<_>>())
            .bind(marks.iter().map(|mark| mark.fate.state()).collect::<Vec<_>>())
            .bind(marks.iter().map(|mark| mark.fate.job().map(|job| job.uuid())).collect::<Vec<Option<Uuid>>>())
            .bind(marks.iter().map(|mark| mark.fate.reason().map(clean)).collect::<Vec<_>>())
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|error| self.error("drop_mark", error))
    }

    async fn drop_ended(&self, place: &str, after: Option<Digest>, limit: u32) -> Result<Vec<EndedFile>, StoreError> {
        let after = after.map(|digest| digest.to_string()).unwrap_or_default();
        let query = sqlx::query(ENDED).bind(clean(place)).bind(after).bind(i64::from(limit));
        let rows = query.fetch_all(&self.pool).await.map_err(|error| self.error("drop_ended", error))?;
        let ended = |row: &PgRow| {
            let state = row.get::<Option<&str>, _>("state").map(|_| self.parsed("drop_ended", "state", row));
            Ok(EndedFile { file: self.drop_file("drop_ended", row)?, state: state.transpose()? })
        };
        rows.iter().map(ended).collect()
    }

    async fn drop_forget(&self, place: &str, unseen: Duration) -> Result<u64, StoreError> {
        let sql = "DELETE FROM drop_files WHERE place = $1 AND seen_at < now() - $2";
        let deleted = sqlx::query(sql).bind(clean(place)).bind(interval(unseen)).execute(&self.pool).await;
        deleted.map(|done| done.rows_affected()).map_err(|error| self.error("drop_forget", error))
    }
}

impl PostgresStore {
    fn drop_file(&self, operation: &'static str, row: &PgRow) -> Result<DropFile, StoreError> {
        Ok(DropFile {
            file: self.parsed(operation, "file", row)?,
            uri: row.get("uri"),
            version: row.get("version"),
            etag: row.get("etag"),
            size_bytes: row.get::<i64, _>("size_bytes").unsigned_abs(),
            fault: row.get("fault"),
            sidecar: row.get("sidecar"),
        })
    }
}
