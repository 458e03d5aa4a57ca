//! Object stores by alias: read, list, write, tag and delete objects of an S3-compatible server.
//!
//! Requests are built here and signed by `object_store`, whose own paths cannot express every key that a bucket may hold (`a//b`), and whose
//! listings fail as a whole for one such key.
//!
//! Invariant: a key is sent exactly as it is; every request has a deadline; no message shows a credential.

mod client;
mod error;
mod listing;
mod probe;
mod request;

pub use client::{Credentials, ObjectClient, StoreOptions};
pub use error::ObjectError;
pub use listing::{Listed, Page, decoded};
pub use probe::{Probe, Reading};
pub use request::{ByteRange, GetRequest, Got, Head};
