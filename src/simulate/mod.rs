//! A pool of GPUs at work, simulated: which cut into groups serves a mix of documents best.
//!
//! The documents come at random, the pool's own [`Router`](crate::plan::route::Router) sends each to a group, and every group decides by the engine's own
//! [`Schedule`](crate::engine::schedule::Schedule) what it does next; only the time of a step is predicted instead of taken.
//!
//! Invariant: pure; the same seed gives the same result. What is simulated is what the daemon and the engine decide, by their own code.

mod group;
mod layout;
mod mix;
mod outcome;
mod pool;
mod profile;
#[cfg(test)]
mod tests;

pub use layout::{Layout, layouts};
pub use mix::{Arrivals, Mix, MixError, Part, tokens};
pub use outcome::{Latency, Outcome};
pub use pool::{Simulation, SimulationOptions};
pub use profile::{Profile, Profiles};
