//! How long each group of a pool will take for a document: what the cost model predicts, times what was learned of this installation.
//!
//! Invariant: no I/O. A group that has learned nothing yet is taken to be off by as much as those that have, so that groups compare from the start.

use crate::cost::{Calibration, CostModel, Learned, Observation, Place, Work};
use crate::engine::{EngineInfo, InferOutcome};
use crate::plan::PrefillPlan;

/// What a device is taken to do whose engine says nothing of its model, in tokens a second; what is learned corrects it.
const GUESS_PER_RANK: f64 = 1000.0;

/// Speeds of all groups.
#[derive(Debug)]
pub(super) struct Speeds {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    place: Place,
    ranks: usize,
    /// Absent where the engine does not say what its model is.
    model: Option<CostModel>,
    learned: Learned,
}

impl Speeds {
    /// Of engines with so many devices each.
    pub fn new<'a>(engines: impl IntoIterator<Item = (usize, &'a EngineInfo)>) -> Self {
        let group = |(ranks, info): (usize, &EngineInfo)| Group {
            place: Place {
                model_digest: info.model_digest.clone(),
                device: info.device.clone(),
                ranks: u32::try_from(ranks).unwrap_or(u32::MAX),
            },
            ranks: ranks.max(1),
            // Rates of another device are off by a factor, which is what is learned.
            model: info.shape.map(|shape| CostModel::new(shape, Calibration::h100())),
            learned: Learned::default(),
        };
        Self { groups: engines.into_iter().map(group).collect() }
    }

    /// Takes over what was learned before.
    pub fn learn(&mut self, known: &[(Place, Learned)]) {
        for group in &mut self.groups {
            if let Some((_, learned)) = known.iter().find(|(place, _)| *place == group.place) {
                group.learned = *learned;
            }
        }
    }

    /// Seconds that a group will take for a plan's prefill.
    pub fn seconds(&self, group: usize, plan: &PrefillPlan) -> f64 {
        let group = &self.groups[group];
        let factor = match group.learned.prefill {
            Some(_) => group.learned.factor(Work::Prefill),
            None => self.usual_factor(),
        };
        group.prefill_s(plan) * factor
    }

    /// Takes in what an inference took, and returns it for others to learn from.
    pub fn observe(&mut self, group: usize, plan: &PrefillPlan, outcome: &InferOutcome) -> Vec<Observation> {
        let group = &mut self.groups[group];
        let observation =
            |work, predicted_s, observed_s| Observation { place: group.place.clone(), work, predicted_s, observed_s };
        let mut seen = vec![observation(Work::Prefill, group.prefill_s(plan), outcome.prefill.as_secs_f64())];
        if let Some(model) = &group.model {
            let cost = model.document(plan, group.ranks, outcome.tokens.len());
            let predicted_s = cost.seconds() - cost.prefill_s;
            seen.push(observation(Work::Generate, predicted_s, outcome.generate.as_secs_f64()));
        }
        seen.iter().for_each(|observation| group.learned.observe(observation));
        seen
    }

    /// By how much predictions are off where something was learned: the geometric mean.
    fn usual_factor(&self) -> f64 {
        let factors: Vec<f64> = self.groups.iter().filter_map(|group| Some(group.learned.prefill?.ln_factor)).collect();
        if factors.is_empty() { 1.0 } else { (factors.iter().sum::<f64>() / factors.len() as f64).exp() }
    }
}

impl Group {
    /// As predicted, without what was learned.
    fn prefill_s(&self, plan: &PrefillPlan) -> f64 {
        match &self.model {
            Some(model) => model.document(plan, self.ranks, 0).prefill_s,
            None => plan.context as f64 / (self.ranks as f64 * GUESS_PER_RANK),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cost::ModelShape;
    use crate::generate::StopReason;
    use crate::plan::{AttentionMode, AttentionRequest, Capabilities};

    fn plan(context: usize) -> PrefillPlan {
        let capabilities = Capabilities { has_retaining_heads: true, max_hosts: 8 };
        let request = AttentionRequest { mode: Some(AttentionMode::Apb), ..AttentionRequest::default() };
        PrefillPlan::new(context, 10, 1, &request, capabilities).expect("a plan")
    }

    fn info(shape: Option<ModelShape>) -> EngineInfo {
        EngineInfo {
            model: "m".to_owned(),
            model_digest: "d".to_owned(),
            max_tokens: 1 << 20,
            has_retaining_heads: true,
            concurrency: 1,
            device: "gpu".to_owned(),
            shape,
        }
    }

    fn outcome(plan: &PrefillPlan, prefill_s: f64) -> InferOutcome {
        InferOutcome {
            tokens: vec![1; 8],
            text: String::new(),
            stop: StopReason::EndOfText,
            plan: plan.clone(),
            prefill: Duration::from_secs_f64(prefill_s),
            generate: Duration::from_millis(100),
        }
    }

    #[test]
    fn what_one_group_learned_holds_for_the_others_until_they_know_better() {
        for shape in [None, ModelShape::published("llama-3.1-8b", 1024)] {
            let info = info(shape);
            let mut speeds = Speeds::new([(1, &info), (4, &info)]);
            let (short, long) = (plan(4096), plan(65536));
            let [one, four] = [speeds.seconds(0, &short), speeds.seconds(1, &short)];
            // One host: four GPUs read it no faster, and gather a little.
            assert!(four < 1.05 * one, "{four} {one}");
            speeds.observe(0, &short, &outcome(&short, 100.0 * one));
            assert!((speeds.seconds(0, &short) / one - 100.0).abs() < 1e-6);
            assert!((speeds.seconds(1, &short) / four - 100.0).abs() < 1e-6, "the same kind of device");
            assert!(speeds.seconds(0, &long) > 15.0 * speeds.seconds(0, &short), "longer takes longer");
            let seen = speeds.observe(1, &short, &outcome(&short, 10.0 * four));
            assert!((speeds.seconds(1, &short) / four - 10.0).abs() < 1e-6, "it knows better now");
            let mut again = Speeds::new([(1, &info), (4, &info)]);
            let mut learned = Learned::default();
            seen.iter().for_each(|observation| learned.observe(observation));
            again.learn(&[(seen[0].place.clone(), learned)]);
            assert!((again.seconds(1, &short) - speeds.seconds(1, &short)).abs() < 1e-9, "what was kept comes back");
        }
    }
}
