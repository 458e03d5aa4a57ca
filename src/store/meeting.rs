//! Where the nodes of a group meet: the first says it at every start of its engine, the others look.
//!
//! Invariant: times are the database's; what the first node said before is gone when it says it again.

use std::time::Duration;

use async_trait::async_trait;

use super::StoreError;

/// Where the first node of a group waits for the others, this time.
#[derive(Clone, PartialEq, Eq)]
pub struct MeetingPlace {
    /// Address and port, as the others reach it.
    pub address: String,
    /// What it lets them in by.
    pub token: String,
}

/// The token is a secret between the nodes.
impl std::fmt::Debug for MeetingPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeetingPlace").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Meeting places of groups, by name.
#[async_trait]
pub trait MeetingStore: Send + Sync {
    /// From now on, and for `valid_for`, the first node of a group waits there.
    async fn meeting_say(&self, group: &str, place: &MeetingPlace, valid_for: Duration) -> Result<(), StoreError>;

    /// Where it waits; `None` if it has not said so, or that was too long ago.
    async fn meeting_look(&self, group: &str) -> Result<Option<MeetingPlace>, StoreError>;
}
