//! What came of a simulation.
//!
//! Invariant: every document is among the done or the refused.

/// A document that is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// Its number, in the order of coming.
    pub document: usize,
    /// Part of the mix.
    pub part: usize,
    /// When it came.
    pub came_s: f64,
    /// When it had its last token.
    pub done_s: f64,
}

impl Done {
    /// Seconds from coming to the last token.
    pub fn latency_s(&self) -> f64 {
        self.done_s - self.came_s
    }
}

/// Seconds from coming to the last token.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Latency {
    /// Half of the documents took no longer.
    pub p50_s: f64,
    /// 95 of 100 took no longer.
    pub p95_s: f64,
}

/// What came of a simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Documents an hour, from the first that came to the last that was done.
    pub per_hour: f64,
    /// Part of the devices' time in which they worked.
    pub busy_share: f64,
    /// Documents that fit into no group.
    pub refused: usize,
    /// Moments at which a group had nothing to do beside a document that waited and fits it; none.
    pub idle_beside_work: usize,
    /// Groups whose sequences took more memory than there is; none, if the schedule keeps its promise.
    pub groups_over_budget: usize,
    /// The others.
    pub done: Vec<Done>,
}

impl Outcome {
    /// Latency of all documents, or of those of one part of the mix.
    pub fn latency(&self, part: Option<usize>) -> Latency {
        let of_part = |done: &&Done| part.is_none_or(|part| done.part == part);
        let mut seconds: Vec<f64> = self.done.iter().filter(of_part).map(Done::latency_s).collect();
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (share * seconds.len() as f64).ceil() as usize;
            seconds.get(index.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Latency { p50_s: at(0.5), p95_s: at(0.95) }
    }
}
