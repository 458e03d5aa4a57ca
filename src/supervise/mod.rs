//! The engine in a process of its own: whatever it meets (a crash, a hang, a poisoned device) ends with it and not with the daemon.
//!
//! [`wire`] is what the two processes say to each other, [`child`] the engine's side, [`process`] one running child, [`engine`] the
//! [`Engine`](crate::engine::Engine) that the pipeline sees: it starts a child, watches it, replaces it, and stops trying for a while
//! when children keep dying ([`breaker`]).
//!
//! Invariant: the daemon's own process never opens a device; a child that failed once serves nobody again.

pub mod breaker;
pub mod child;
pub mod engine;
mod process;
pub mod wire;

pub use engine::{EngineOptions, SupervisedEngine};
