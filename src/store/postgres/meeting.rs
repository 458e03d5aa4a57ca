//! Where the nodes of a group meet.
//!
//! Invariant: one token an address.

use std::time::Duration;

use async_trait::async_trait;

use super::PostgresStore;
use super::rows::interval;
use crate::store::{MeetingStore, StoreError};

const SAY: &str = "\
INSERT INTO meeting_places (address, token, valid_until) VALUES ($1, $2, now() + $3) \
ON CONFLICT (address) DO UPDATE SET token = excluded.token, valid_until = excluded.valid_until";

const LOOK: &str = "SELECT token FROM meeting_places WHERE address = $1 AND valid_until > now()";

#[async_trait]
impl MeetingStore for PostgresStore {
    async fn meeting_say(&self, address: &str, token: &str, valid_for: Duration) -> Result<(), StoreError> {
        let query = sqlx::query(SAY).bind(address).bind(token).bind(interval(valid_for));
        query.execute(&self.pool).await.map(drop).map_err(|error| self.error("meeting_say", error))
    }

    async fn meeting_look(&self, address: &str) -> Result<Option<String>, StoreError> {
        let token = sqlx::query_scalar(LOOK).bind(address).fetch_optional(&self.pool).await;
        token.map_err(|error| self.error("meeting_look", error))
    }
}
