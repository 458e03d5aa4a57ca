//! Where the nodes of a group meet: the first says at every start of its engine that it waits, the others look whether it does.
//!
//! Invariant: times are the database's; what was said before of an address is gone when it is said again.

use std::time::Duration;

use async_trait::async_trait;

use super::StoreError;

/// Meeting places, by the address that all nodes of a group know.
#[async_trait]
pub trait MeetingStore: Send + Sync {
    /// From now on, and for `valid_for`, the first node of a group waits at `address`, and lets in who has `token`.
    async fn meeting_say(&self, address: &str, token: &str, valid_for: Duration) -> Result<(), StoreError>;

    /// The token of who waits at `address`; `None` if nobody has said so, or that was too long ago.
    async fn meeting_look(&self, address: &str) -> Result<Option<String>, StoreError>;
}
