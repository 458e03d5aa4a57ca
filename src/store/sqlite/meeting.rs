//! Where the nodes of a group meet.
//!
//! Invariant: one token an address.

use std::time::Duration;

use async_trait::async_trait;

use super::{SqliteStore, now};
use crate::store::{MeetingStore, StoreError};

const SAY: &str = concat!(
    "INSERT INTO meeting_places (address, token, valid_until) VALUES ($1, $2, ",
    now!(),
    " + $3) ON CONFLICT (address) DO UPDATE SET token = excluded.token, valid_until = excluded.valid_until"
);

const LOOK: &str = concat!("SELECT token FROM meeting_places WHERE address = $1 AND valid_until > ", now!());

#[async_trait]
impl MeetingStore for SqliteStore {
    async fn meeting_say(&self, address: &str, token: &str, valid_for: Duration) -> Result<(), StoreError> {
        let query = sqlx::query(SAY).bind(address).bind(token).bind(valid_for.as_millis() as i64);
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("meeting_say", error))
    }

    async fn meeting_look(&self, address: &str) -> Result<Option<String>, StoreError> {
        let token = sqlx::query_scalar(LOOK).bind(address).fetch_optional(&self.pool).await;
        token.map_err(|error| self.error("meeting_look", error))
    }
}
