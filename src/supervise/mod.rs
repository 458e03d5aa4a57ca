//! The engine in a process of its own: whatever it meets (a crash, a hang, a poisoned device) ends with it and not with the daemon.
//!
//! [`wire`] is what the two processes say to each other, [`child`] the engine's side, [`process`] one running child, [`engine`] the
//! [`Engine`](crate::engine::Engine) that the pipeline sees: it has many callers at once, starts a child ([`keeper`]), watches it and
//! replaces it. [`flights`] decides who may be in the child and who is to blame for its end, [`culprits`] remembers who was; [`breaker`]
//! says when to stop trying for a while.
//!
//! A [`pool`] has several such engines, each on devices of its own, and brings every document to one of them, by the policy of
//! [`plan::route`](crate::plan::route) and the [`speeds`] that it has seen.
//!
//! Invariant: the daemon's own process never opens a device; a child that failed once serves nobody again; no lock is held while a child works.

pub mod breaker;
pub mod child;
mod culprits;
pub mod engine;
mod flights;
mod keeper;
pub mod pool;
mod process;
mod speeds;
mod state;
pub mod wire;

pub use engine::{EngineOptions, Prepare, Prepared};
pub use pool::{Pool, PoolGroup};
