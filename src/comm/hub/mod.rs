//! Ranks on several machines: the first node has the rounds of all, the ranks of the others come to them over TCP.
//!
//! What goes over the hub is small (words, barriers, whether sizes agree, orders) but for ranks on processors, whose rows go this way too. Nodes trust the
//! network between them; a token keeps those of another group, or of an earlier time, out.
//!
//! Invariant: a node that does not come, dies or falls silent is noticed within a bounded time, and ends the communicator for all.

mod line;
mod server;
mod wire;

use std::panic::resume_unwind;
use std::thread;
use std::time::Duration;

pub(super) use line::Line;
pub use line::{Heard, Told};
pub use server::{Hub, Orders};

use super::CommError;
use super::meeting::Meeting;

/// After so long without a word the other side is taken for dead.
pub const SILENCE: Duration = Duration::from_secs(10);
/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(2);

/// One node's place among several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Number of this node; the hub is on node 0.
    pub node: usize,
    /// Nodes in all, each with as many ranks as any other.
    pub nodes: usize,
    /// Where node 0 listens: `0.0.0.0:7443`.
    pub listen: String,
    /// Where the others reach it.
    pub address: String,
    /// What tells this group, this time, from others.
    pub token: String,
    /// Until all nodes have come.
    pub start: Duration,
}

/// What a node has beside its ranks' ends.
pub enum Side {
    /// The first node: the hub, with the orders for the others.
    First(Hub),
    /// Another node: what it is told to do.
    Other(Told),
}

/// A node's ranks at the hub.
pub(super) struct Met {
    /// Each of its ranks' way to the others.
    pub meetings: Vec<Meeting>,
    /// What the first node has told all.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub secret: Vec<u8>,
    /// What it has beside.
    pub side: Side,
}

/// Meets the other nodes with `here` ranks; all nodes have as many. `secret` is the first node's, and told to all.
pub(super) fn meet(place: &Place, here: usize, deadline: Duration, secret: &[u8]) -> Result<Met, CommError> {
    if place.node == 0 {
        let hub = Hub::open(place, here, deadline, secret)?;
        let meetings = (0..here).map(|_| Meeting::Here(hub.rounds().clone())).collect();
        return Ok(Met { meetings, secret: secret.to_vec(), side: Side::First(hub) });
    }
    let (first, size) = (place.node * here, place.nodes * here);
    // All at once: nobody is let in before all have come.
    let (lines, told) = thread::scope(|scope| {
        let told = scope.spawn(|| Told::open(place, size));
        let sit = |rank| scope.spawn(move || Line::open(place, rank, size, deadline));
        let lines: Vec<_> = (first..first + here).map(sit).collect();
        let lines = lines.into_iter().map(|line| line.join().unwrap_or_else(|p| resume_unwind(p)));
        (lines.collect::<Result<Vec<_>, _>>(), told.join().unwrap_or_else(|p| resume_unwind(p)))
    });
    let (lines, side) = (lines?, Side::Other(told?));
    let secret = lines.first().map(|(_, secret)| secret.clone()).unwrap_or_default();
    Ok(Met { meetings: lines.into_iter().map(|(line, _)| Meeting::There(line)).collect(), secret, side })
}

#[cfg(test)]
mod tests;
