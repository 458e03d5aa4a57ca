//! How long collectives take: a ring of all ranks, node by node.
//!
//! Invariant: with one rank nothing travels and nothing takes time.

use super::calibration::{Calibration, Network};

impl Network {
    /// Nodes that so many ranks are spread over.
    pub fn nodes(&self, ranks: usize) -> usize {
        ranks.div_ceil(self.gpus_per_node)
    }

    /// Seconds until every one of `ranks` ranks has all `bytes`, of which each brings about as much: `bytes` come to every rank but its own part, what other
    /// nodes have comes in by all adapters of the node together.
    pub fn all_gather_s(&self, ranks: usize, bytes: f64) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        let nodes = self.nodes(ranks);
        let of_node = ranks.min(self.gpus_per_node);
        let within = bytes * (ranks - 1) as f64 / ranks as f64 / (self.within.gb_s * 1e9);
        let between = bytes * (nodes - 1) as f64 / nodes as f64 / (self.between.gb_s * 1e9 * of_node as f64);
        let within = if of_node > 1 { within } else { 0.0 };
        self.latency_s(ranks) + within.max(between)
    }

    /// Seconds until partial results, `bytes` of all ranks together, have come to every one of `ranks` ranks and are one.
    pub fn partials_s(&self, ranks: usize, bytes: f64) -> f64 {
        if ranks <= 1 || self.nodes(ranks) > 1 {
            return self.all_gather_s(ranks, bytes);
        }
        self.partials_us * 1e-6 + bytes * (ranks - 1) as f64 / ranks as f64 / (self.within.gb_s * 1e9)
    }

    /// Seconds in which every rank sends `bytes` to the next one.
    pub fn rotate_s(&self, ranks: usize, bytes: f64) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        let link = if self.nodes(ranks) > 1 { self.between } else { self.within };
        link.latency_us * 1e-6 + bytes / (link.gb_s * 1e9)
    }

    /// Seconds in which every rank sends `bytes` in all to the others, to each about as much.
    pub fn all_to_all_s(&self, ranks: usize, bytes: f64) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        let of_node = ranks.min(self.gpus_per_node);
        let to_each = bytes / ranks as f64;
        let within = to_each * (of_node - 1) as f64 / (self.within.gb_s * 1e9);
        let between = to_each * (ranks - of_node) as f64 / (self.between.gb_s * 1e9);
        self.latency_s(ranks) + within.max(between)
    }

    /// Until the first byte comes: within a node all reach each other directly, from node to node it goes in steps.
    fn latency_s(&self, ranks: usize) -> f64 {
        let (nodes, of_node) = (self.nodes(ranks), ranks.min(self.gpus_per_node));
        let within = if of_node > 1 { self.within.latency_us } else { 0.0 };
        let between = (nodes as f64).log2().ceil() * self.between.latency_us;
        (within + between) * 1e-6
    }
}

impl Calibration {
    /// Seconds of bytes that are read and written by operations bound by memory.
    pub(super) fn memory_s(&self, bytes: f64) -> f64 {
        bytes / (self.rates.memory_gb_s * 1e9)
    }
}
