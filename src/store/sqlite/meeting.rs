//! Meeting places of groups.
//!
//! Invariant: one place a group.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row;

use super::{SqliteStore, now};
use crate::store::{MeetingPlace, MeetingStore, StoreError};

const SAY: &str = concat!(
    "INSERT INTO meeting_places (group_name, address, token, valid_until) VALUES ($1, $2, $3, ",
    now!(),
    " + $4) ON CONFLICT (group_name) DO UPDATE SET address = excluded.address, token = excluded.token, valid_until = excluded.valid_until"
);

const LOOK: &str =
    concat!("SELECT address, token FROM meeting_places WHERE group_name = $1 AND valid_until > ", now!());

#[async_trait]
impl MeetingStore for SqliteStore {
    async fn meeting_say(&self, group: &str, place: &MeetingPlace, valid_for: Duration) -> Result<(), StoreError> {
        let query = sqlx::query(SAY).bind(group).bind(&place.address).bind(&place.token);
        let said = query.bind(valid_for.as_millis() as i64).execute(&self.pool).await;
        said.map(drop).map_err(|error| self.error("meeting_say", error))
    }

    async fn meeting_look(&self, group: &str) -> Result<Option<MeetingPlace>, StoreError> {
        let row = sqlx::query(LOOK).bind(group).fetch_optional(&self.pool).await;
        let row = row.map_err(|error| self.error("meeting_look", error))?;
        Ok(row.map(|row| MeetingPlace { address: row.get("address"), token: row.get("token") }))
    }
}
