//! Completion events on their way out.
//!
//! Invariant: an event leaves the table only when it was confirmed.

use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::PostgresStore;
use super::rows::interval;
use crate::job::clean::clean;
use crate::store::{OutboxEvent, Reply, StoreError};

const TAKE: &str = "\
UPDATE outbox SET tries = tries + 1, available_at = clock_timestamp() + $2 \
WHERE event_id IN (SELECT event_id FROM outbox WHERE given_up IS NULL AND available_at <= now() ORDER BY available_at LIMIT $1 FOR UPDATE SKIP LOCKED) \
RETURNING event_id, job_id, target, correlation_id, body, tries";

const RETURN: &str = "\
UPDATE outbox SET available_at = now() + coalesce($2, interval '0'), given_up = CASE WHEN $2 IS NULL THEN $3 END WHERE event_id = $1";

impl PostgresStore {
    pub(super) async fn take_events(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxEvent>, StoreError> {
        let taken = sqlx::query(TAKE).bind(i64::from(limit)).bind(interval(lease)).fetch_all(&self.pool).await;
        let event = |row: &sqlx::postgres::PgRow| OutboxEvent {
            event_id: row.get("event_id"),
            job: row.get::<Uuid, _>("job_id").into(),
            reply: Reply { target: row.get("target"), correlation_id: row.get("correlation_id") },
            body: row.get("body"),
            tries: (row.get::<i32, _>("tries") - 1).unsigned_abs(),
        };
        Ok(taken.map_err(|error| self.error("outbox_take", error))?.iter().map(event).collect())
    }

    pub(super) async fn confirm_events(&self, events: &[Uuid]) -> Result<(), StoreError> {
        let deleted = sqlx::query("DELETE FROM outbox WHERE event_id = ANY($1)").bind(events).execute(&self.pool).await;
        deleted.map(drop).map_err(|error| self.error("outbox_confirm", error))
    }

    pub(super) async fn return_event(
        &self,
        event: Uuid,
        reason: &str,
        after: Option<Duration>,
    ) -> Result<(), StoreError> {
        let query = sqlx::query(RETURN).bind(event).bind(after.map(interval)).bind(clean(reason));
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("outbox_return", error))
    }
}
