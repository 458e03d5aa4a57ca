//! The RabbitMQ door: messages in, the inbox fed, and only then the broker told that it may forget them.
//!
//! The way of a delivery: [`delivery`] makes a job or a refusal of it, [`session`] enqueues what is a job (commit, then ack) and sends what
//! is none to the dead-letter exchange with the reason, [`supervisor`] opens sessions for as long as the process works and stops consuming
//! while the inbox is full. [`publisher`] is the other direction, for dead letters, completion events and `apbd submit`.
//!
//! Invariant: a delivery is acked after its job, or the row of its refusal, is committed; never before.

pub mod broker;
pub mod delivery;
pub mod hints;
pub mod publisher;
mod session;
pub mod supervisor;
pub mod topology;

pub use broker::{AmqpError, Broker};
pub use delivery::Terms;
pub use publisher::{Message, PublishError, Publisher};
pub use supervisor::{Admission, AmqpIntake};
pub use topology::Topology;
