//! apbd: batch processing of long documents with APB, sequence-parallel approximate attention.
//!
//! The modules are listed in the order in which a document travels; `README.md` has the map.

pub use apbd_backend as backend;

pub mod cli;
pub mod comm;
pub mod config;
pub mod cost;
pub mod document;
pub mod engine;
pub mod failpoint;
pub mod generate;
pub mod intake;
pub mod job;
pub mod model;
pub mod objects;
pub mod outbox;
pub mod pipeline;
pub mod plan;
pub mod prompt;
pub mod simulate;
pub mod store;
pub mod supervise;
pub mod telemetry;
