//! How fast each group of a pool was seen to prefill, and what follows for the next document.
//!
//! Invariant: pure. What was never seen is guessed from what was: other lengths of the same group, then other groups by their devices; so that
//! groups compare also before each has seen everything.

use std::collections::HashMap;
use std::time::Duration;

use crate::plan::{AttentionMode, PrefillPlan};

/// What a device is taken to do before any has done anything, in tokens a second. Only relations between groups follow from it.
const GUESS_PER_RANK: f64 = 1000.0;
/// Weight of the latest document.
const LATEST: f64 = 0.3;

/// One kind of prefill: strategy, and the power of four that its length is next to.
type Kind = (AttentionMode, u32);

/// Speeds of all groups.
#[derive(Debug)]
pub(super) struct Speeds {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    ranks: usize,
    /// Context tokens a second.
    seen: HashMap<Kind, f64>,
}

impl Speeds {
    /// Of groups with so many devices each.
    pub fn new(ranks: impl IntoIterator<Item = usize>) -> Self {
        let group = |ranks: usize| Group { ranks: ranks.max(1), seen: HashMap::new() };
        Self { groups: ranks.into_iter().map(group).collect() }
    }

    /// A group has prefilled a plan in so much time, in tokens a second.
    pub fn observe(&mut self, group: usize, plan: &PrefillPlan, prefill: Duration) -> f64 {
        let rate = plan.context as f64 / prefill.as_secs_f64().max(1e-6);
        let seen = self.groups[group].seen.entry(kind(plan)).or_insert(rate);
        *seen += LATEST * (rate - *seen);
        rate
    }

    /// Seconds that a group will take for a plan's prefill.
    pub fn seconds(&self, group: usize, plan: &PrefillPlan) -> f64 {
        let ranks = self.groups[group].ranks as f64;
        let others = || {
            let rates: Vec<f64> =
                self.groups.iter().filter_map(|other| Some(other.rate(kind(plan))? / other.ranks as f64)).collect();
            (!rates.is_empty()).then(|| ranks * rates.iter().sum::<f64>() / rates.len() as f64)
        };
        let rate = self.groups[group].rate(kind(plan)).or_else(others).unwrap_or(ranks * GUESS_PER_RANK);
        plan.context as f64 / rate
    }
}

impl Group {
    /// Of the kind that is nearest: the same strategy first, then the nearest length.
    fn rate(&self, (mode, size): Kind) -> Option<f64> {
        let distance = |kind: &Kind| (kind.0 != mode, kind.1.abs_diff(size), kind.1);
        self.seen.iter().min_by_key(|(kind, _)| distance(kind)).map(|(_, rate)| *rate)
    }
}

fn kind(plan: &PrefillPlan) -> Kind {
    (plan.mode, (plan.context.max(1) as f64).log(4.0).round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{AttentionRequest, Capabilities};

    fn plan(context: usize, mode: AttentionMode) -> PrefillPlan {
        let capabilities = Capabilities { has_retaining_heads: true, max_hosts: 8 };
        let request = AttentionRequest { mode: Some(mode), ..AttentionRequest::default() };
        PrefillPlan::new(context, 10, 1, &request, capabilities).expect("a plan")
    }

    #[test]
    fn what_was_not_seen_is_guessed_from_the_nearest_that_was() {
        let mut speeds = Speeds::new([1, 4]);
        let (short, long) = (plan(4096, AttentionMode::Full), plan(65536, AttentionMode::Full));
        assert!((speeds.seconds(0, &short) / speeds.seconds(1, &short) - 4.0).abs() < 1e-9);
        speeds.observe(0, &short, Duration::from_secs(2));
        assert!((speeds.seconds(0, &short) - 2.0).abs() < 1e-9);
        assert!((speeds.seconds(1, &short) - 0.5).abs() < 1e-9, "four devices do four times as much");
        assert!((speeds.seconds(0, &long) - 32.0).abs() < 1e-9, "another length of the same strategy");
        speeds.observe(0, &long, Duration::from_secs(100));
        assert!((speeds.seconds(0, &long) - 100.0).abs() < 1e-9);
        assert!((speeds.seconds(0, &plan(60000, AttentionMode::Apb)) - 60000.0 / 655.36).abs() < 1e-6);
        speeds.observe(0, &short, Duration::from_secs(1));
        let seconds = speeds.seconds(0, &short);
        assert!(seconds < 2.0 && seconds > 1.0, "{seconds}");
    }
}
