//! The layer loop against an independent oracle: every strategy, selector, number of hosts and number of ranks.
//!
//! Invariant: the oracle shares no code with the engine; it is dense, slow, in f64, and written from the algorithm alone.

// A test that can not be set up has failed.
#![allow(clippy::unwrap_used)]

mod batch;
mod failures;
mod forward;
mod goldens;
mod instrumented;
mod memory;
mod models;
mod nodes;
mod oracle;
mod runs;
mod service;
mod strategies;
mod unruly;
mod work;
