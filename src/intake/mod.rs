//! Doors that jobs come in by; all lead to [`Store::enqueue`](crate::store::Store::enqueue).
//!
//! Invariant: what a door has taken in is on disk before the door says so to anybody.

pub mod amqp;
pub mod dropfolder;
pub mod files;
