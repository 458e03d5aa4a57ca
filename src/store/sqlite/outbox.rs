//! Completion events on their way out.
//!
//! Invariant: an event leaves the table only when it was confirmed.

use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::{SqliteStore, now};
use crate::store::{OutboxEvent, Reply, StoreError};

const TAKE: &str = concat!(
    "UPDATE outbox SET tries = tries + 1, available_at = ",
    now!(),
    " + $2 WHERE event_id IN (SELECT event_id FROM outbox WHERE given_up IS NULL AND available_at <= ",
    now!(),
    " ORDER BY available_at LIMIT $1) RETURNING event_id, job_id, target, correlation_id, body, tries"
);

const RETURN: &str = concat!(
    "UPDATE outbox SET available_at = ",
    now!(),
    " + coalesce($2, 0), given_up = CASE WHEN $2 IS NULL THEN $3 END WHERE event_id = $1"
);

impl SqliteStore {
    pub(super) async fn take_events(&self, limit: u32, lease: Duration) -> Result<Vec<OutboxEvent>, StoreError> {
        let rows = sqlx::query(TAKE).bind(i64::from(limit)).bind(lease.as_millis() as i64).fetch_all(&self.pool).await;
        let rows = rows.map_err(|error| self.error("outbox_take", error))?;
        let event = |row: &sqlx::sqlite::SqliteRow| {
            let reply = Reply { target: row.get("target"), correlation_id: row.get("correlation_id") };
            Ok(OutboxEvent {
                event_id: self.parsed("outbox_take", "event_id", row.get::<String, _>("event_id"))?,
                job: self.parsed("outbox_take", "job_id", row.get::<String, _>("job_id"))?,
                reply,
                body: self.json("outbox_take", "body", row.get::<String, _>("body"))?,
                tries: (row.get::<i64, _>("tries") - 1) as u32,
            })
        };
        rows.iter().map(event).collect()
    }

    pub(super) async fn confirm_events(&self, events: &[Uuid]) -> Result<(), StoreError> {
        let mut transaction = self.begin("outbox_confirm").await?;
        for event in events {
            let deleted = sqlx::query("DELETE FROM outbox WHERE event_id = $1").bind(event.to_string());
            deleted.execute(&mut *transaction).await.map_err(|error| self.error("outbox_confirm", error))?;
        }
        self.commit("outbox_confirm", transaction).await
    }

    pub(super) async fn return_event(
        &self,
        event: Uuid,
        reason: &str,
        after: Option<Duration>,
    ) -> Result<(), StoreError> {
        let query =
            sqlx::query(RETURN).bind(event.to_string()).bind(after.map(|after| after.as_millis() as i64)).bind(reason);
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("outbox_return", error))
    }
}
