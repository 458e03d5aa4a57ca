//! The promises of the schedule, kept by a whole pool: nobody starves, no work is lost, no group idles beside a document that fits it, and memory is
//! never over budget.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::cost::{Calibration, CostModel, ModelShape};
use crate::engine::schedule::Limits;
use crate::plan::{AttentionRequest, Capabilities, PlanError, PrefillPlan};

const LIMITS: Limits = Limits { at_once: 8, stall: Duration::from_millis(200) };

fn model() -> CostModel {
    CostModel::new(ModelShape::published("llama-3.1-8b", 1024).expect("a shape"), Calibration::h100())
}

fn plan(tokens: usize, ranks: usize) -> Result<PrefillPlan, PlanError> {
    let request = AttentionRequest { hosts: Some(ranks.max(8)), ..AttentionRequest::default() };
    PrefillPlan::new(tokens, 64, 0, &request, Capabilities { has_retaining_heads: true, max_hosts: 256 })
}

fn options(documents: usize, arrivals: Arrivals, seed: u64) -> SimulationOptions {
    SimulationOptions { documents, arrivals, new_tokens: 32, limits: LIMITS, seed }
}

fn simulated(layout: &Layout, mix: &Mix, options: SimulationOptions) -> Outcome {
    let model = model();
    let sizes: Vec<usize> = layout.sizes().into_iter().map(|(size, _)| size).collect();
    let profiles = Profiles::new(&model, mix, &sizes, LIMITS.at_once, options.new_tokens, plan).expect("plans");
    Simulation::run(layout, mix, &profiles, options)
}

fn mix(text: &str) -> Mix {
    text.parse().expect("a mix")
}

#[test]
fn mixes_are_read_as_people_write_them() {
    let expected = vec![Part { tokens: 4096, weight: 30.0 }, Part { tokens: 131_072, weight: 20.5 }];
    assert_eq!(mix("128K:20.5, 4k:30").parts, expected);
    assert_eq!(mix("4096:30 # letters\n128K:20.5\n\n").parts, expected);
    assert_eq!(mix("1M").shares(), [1.0]);
    for wrong in ["", "# nothing", "4K:0", "4K:-1", "K:1", "0:1", "4K:nan", "4K:1:2"] {
        assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
    }
}

#[test]
fn a_node_of_eight_is_cut_in_all_ways() {
    let names: Vec<String> = layouts(8, 1).iter().map(Layout::to_string).collect();
    let expected = "1x8 2x4 1x4+2x2 1x4+1x2+2x1 1x4+4x1 4x2 3x2+2x1 2x2+4x1 1x2+6x1 8x1";
    assert_eq!(names.join(" "), expected);
    let two = layouts(2, 4);
    let names: Vec<String> = two.iter().map(Layout::to_string).collect();
    assert_eq!(names, ["4x2", "8x1", "2x4", "1x8"]);
    assert!(two.iter().all(|layout| layout.devices() == 8));
}

#[test]
fn arrivals_follow_the_mix_and_the_seed() {
    let mix = mix("4K:30,32K:50,128K:20");
    let documents = mix.documents(4000, Arrivals::Random { per_s: 2.0 }, 7);
    assert_eq!(documents, mix.documents(4000, Arrivals::Random { per_s: 2.0 }, 7));
    assert_ne!(documents, mix.documents(4000, Arrivals::Random { per_s: 2.0 }, 8));
    for (part, share) in mix.shares().into_iter().enumerate() {
        let seen = documents.iter().filter(|(of, _)| *of == part).count() as f64 / 4000.0;
        assert!((seen - share).abs() < 0.03, "{part}: {seen}");
    }
    let span = documents.last().expect("documents").1;
    assert!((4000.0 / span / 2.0 - 1.0).abs() < 0.05, "{span}");
    assert!(documents.windows(2).all(|pair| pair[0].1 <= pair[1].1));
}

#[test]
fn one_group_alone_takes_as_long_as_predicted() {
    let (model, mix) = (model(), mix("32K"));
    let outcome = simulated(&Layout::new(vec![1]), &mix, options(1, Arrivals::AtOnce, 1));
    let plan = plan(32 << 10, 1).expect("a plan");
    let predicted = model.document(&plan, 1, 32).seconds();
    assert_eq!(outcome.done.len(), 1);
    let took = outcome.done[0].latency_s();
    assert!((took / predicted - 1.0).abs() < 0.01, "{took} is not {predicted}");
}

#[test]
fn what_fits_nowhere_is_refused_and_the_others_are_done() {
    let mix = mix("4K:1,1M:1");
    let outcome = simulated(&Layout::new(vec![1, 1]), &mix, options(40, Arrivals::AtOnce, 3));
    assert!(outcome.refused > 0 && outcome.done.iter().all(|done| done.part == 0));
    assert_eq!(outcome.refused + outcome.done.len(), 40);
    let whole = simulated(&Layout::new(vec![8]), &mix, options(10, Arrivals::AtOnce, 3));
    assert_eq!((whole.refused, whole.done.len()), (0, 10));
}

#[test]
fn a_short_document_does_not_wait_for_a_long_one() {
    let mix = mix("4K:95,256K:5");
    // Of the answer the first token counts here: later ones come at the pace that the schedule's stall allows.
    let first = SimulationOptions { new_tokens: 1, ..options(60, Arrivals::Random { per_s: 0.2 }, 5) };
    let outcome = simulated(&Layout::new(vec![1]), &mix, first);
    let long_s = model().document(&plan(256 << 10, 1).expect("a plan"), 1, 32).seconds();
    assert!(outcome.done.iter().any(|done| done.part == 1));
    let short = outcome.latency(Some(0));
    assert!(short.p95_s < 0.2 * long_s, "{} beside one of {long_s}", short.p95_s);
}

#[test]
fn a_long_document_has_its_turn_however_many_short_ones_come() {
    let mix = mix("4K:98,256K:2");
    // Twice what the device can do.
    let outcome = simulated(&Layout::new(vec![1]), &mix, options(400, Arrivals::Random { per_s: 8.0 }, 11));
    let long_s = model().document(&plan(256 << 10, 1).expect("a plan"), 1, 32).seconds();
    let mut done = outcome.done.clone();
    done.sort_by_key(|done| done.document);
    let long: Vec<_> = done.iter().filter(|done| done.part == 1).collect();
    assert!(long.len() > 2);
    let mut before_s = 0.0;
    for (turn, long) in long.into_iter().enumerate() {
        // Long ones wait for each other; of short ones, those that came before it, and as much again as it takes itself.
        let earlier = done[..long.document].iter().filter(|done| done.part == 0).count() as f64;
        before_s = f64::max(before_s, earlier * 0.25);
        let bound_s = before_s + 3.0 * long_s * (turn + 1) as f64;
        assert!(long.done_s < bound_s, "done at {}, not before {bound_s}", long.done_s);
    }
}

#[test]
fn documents_wait_longer_the_more_there_are() {
    let mix = mix("32K");
    let at =
        |per_s| simulated(&Layout::new(vec![1; 4]), &mix, options(300, Arrivals::Random { per_s }, 9)).latency(None);
    assert!(at(1.0).p95_s < at(2.5).p95_s && at(2.5).p95_s < at(6.0).p95_s);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever comes, and however the pool is cut: all is done or refused, the latest not long after the others; groups work while documents wait; memory is enough.
    #[test]
    fn a_pool_keeps_its_promises(
        cut in 0usize..10,
        weights in proptest::collection::vec(1u32..20, 4),
        load in 0.2f64..3.0,
        seed in 0u64..1000,
    ) {
        let layout = &layouts(8, 1)[cut];
        let lengths = ["4K", "32K", "128K", "512K"];
        let text: Vec<_> = lengths.iter().zip(&weights).map(|(length, weight)| format!("{length}:{weight}")).collect();
        let mix = mix(&text.join(","));
        let count = 120;
        let outcome = simulated(layout, &mix, options(count, Arrivals::Random { per_s: load }, seed));
        prop_assert_eq!(outcome.groups_over_budget, 0);
        // Nobody starves, nothing is lost, nothing is done twice.
        let mut documents: Vec<_> = outcome.done.iter().map(|done| done.document).collect();
        documents.sort_unstable();
        documents.dedup();
        prop_assert_eq!(documents.len(), outcome.done.len());
        prop_assert_eq!(outcome.done.len() + outcome.refused, count);
        prop_assert!(outcome.done.iter().all(|done| done.latency_s() > 0.0));
        // Work is conserved, also with all documents there from the start.
        prop_assert_eq!(outcome.idle_beside_work, 0);
        let drained = simulated(layout, &mix, options(count, Arrivals::AtOnce, seed));
        prop_assert_eq!(drained.done.len() + drained.refused, count);
        prop_assert_eq!((drained.idle_beside_work, drained.groups_over_budget), (0, 0));
    }
}
