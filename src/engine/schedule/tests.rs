//! The schedule by simulation: a clock that runs as the steps take, arrivals at random times, a memory that is counted.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const BUDGET: u64 = 100;
const LAYERS: usize = 4;
const RATE: f64 = 1000.0;
const STEP_S: f64 = 0.01;

/// A sequence that comes at a step, and generates so many tokens.
#[derive(Debug, Clone)]
struct Arrival {
    at_step: usize,
    flops: f64,
    kept: u64,
    transient: u64,
    query_passes: usize,
    tokens: usize,
}

fn needs(arrival: &Arrival) -> Needs {
    Needs {
        layers: LAYERS,
        layer_flops: arrival.flops,
        query_passes: arrival.query_passes,
        kept_bytes: arrival.kept,
        transient_bytes: arrival.transient,
    }
}

fn limits() -> Limits {
    Limits { at_once: 6, stall: Duration::from_millis(200) }
}

/// How a simulation went.
#[derive(Default)]
struct Run {
    /// Steps in their order.
    steps: Vec<Step>,
    ended: BTreeSet<SequenceId>,
    refused: BTreeSet<SequenceId>,
    /// Step at which a sequence began.
    began: BTreeMap<SequenceId, usize>,
    most_bytes: u64,
    /// Longest time of prefills between two steps of what generated all the while, in seconds.
    longest_stall: f64,
}

/// Runs all arrivals to their end; sequence `i` is arrival `i`.
fn simulate(arrivals: &[Arrival]) -> Run {
    let mut schedule = Schedule::new(limits());
    schedule.learn(RATE);
    schedule.learn_step(STEP_S);
    let mut run = Run::default();
    let mut left: BTreeMap<SequenceId, usize> = BTreeMap::new();
    let (mut came, mut stall) = (0, 0.0);
    for step in 0.. {
        assert!(step < 100_000, "it never ends");
        while came < arrivals.len() && (arrivals[came].at_step <= step || schedule.is_empty()) {
            schedule.add(SequenceId(came as u64), needs(&arrivals[came]));
            came += 1;
        }
        let next = schedule.next(BUDGET);
        run.most_bytes = run.most_bytes.max(schedule.used_bytes());
        let of = |id: &SequenceId| &arrivals[id.0 as usize];
        match &next {
            Step::Begin(id) => {
                assert!(run.began.insert(*id, step).is_none(), "{id:?} begins twice");
            }
            Step::Layer(id) => {
                stall += if left.is_empty() { 0.0 } else { of(id).flops / RATE };
                let layers = run.steps.iter().filter(|step| **step == Step::Layer(*id)).count() + 1;
                if layers == LAYERS && of(id).query_passes == 0 {
                    left.insert(*id, of(id).tokens);
                }
            }
            Step::Query(id) => {
                let passes = run.steps.iter().filter(|step| **step == Step::Query(*id)).count() + 1;
                if passes == of(id).query_passes {
                    left.insert(*id, of(id).tokens);
                }
            }
            Step::Generate(ids) => {
                assert_eq!(ids.iter().collect::<BTreeSet<_>>(), left.keys().collect::<BTreeSet<_>>());
                for id in ids {
                    let tokens = left.get_mut(id).unwrap();
                    *tokens -= 1;
                    if *tokens == 0 {
                        left.remove(id);
                        schedule.end(*id);
                        run.ended.insert(*id);
                    }
                }
                stall = 0.0;
            }
            Step::Refuse(id) => {
                run.refused.insert(*id);
            }
            Step::Wait => {
                assert!(schedule.is_empty(), "there is work, and nothing is done");
                if came == arrivals.len() {
                    return run;
                }
            }
        }
        run.longest_stall = run.longest_stall.max(stall);
        run.steps.push(next);
    }
    run
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (0..400usize, 1..200u32, 1..60u64, 0..60u64, 0..3usize, 1..20usize).prop_map(
        |(at_step, flops, kept, transient, query_passes, tokens)| Arrival {
            at_step,
            flops: f64::from(flops),
            kept,
            transient,
            query_passes,
            tokens,
        },
    )
}

proptest! {
    #[test]
    fn every_sequence_is_served_within_the_budget_and_only_what_can_not_fit_is_refused(
        mut arrivals in proptest::collection::vec(arrival(), 1..40)
    ) {
        arrivals.sort_by_key(|arrival| arrival.at_step);
        let run = simulate(&arrivals);
        prop_assert!(run.most_bytes <= BUDGET);
        for (index, arrival) in arrivals.iter().enumerate() {
            let id = SequenceId(index as u64);
            let fits = arrival.kept + arrival.transient <= BUDGET;
            prop_assert_eq!(run.ended.contains(&id), fits);
            prop_assert_eq!(run.refused.contains(&id), !fits);
            let layers = run.steps.iter().filter(|step| **step == Step::Layer(id)).count();
            prop_assert_eq!(layers, if fits { LAYERS } else { 0 });
        }
    }

    #[test]
    fn what_generates_never_waits_longer_than_the_stall_and_a_layer(
        mut arrivals in proptest::collection::vec(arrival(), 1..40)
    ) {
        arrivals.sort_by_key(|arrival| arrival.at_step);
        let run = simulate(&arrivals);
        let longest_layer = arrivals.iter().map(|arrival| arrival.flops / RATE).fold(0.0, f64::max);
        prop_assert!(run.longest_stall <= limits().stall.as_secs_f64() + longest_layer + 1e-9);
    }

    #[test]
    fn a_sequence_is_passed_over_a_bounded_number_of_times(
        mut arrivals in proptest::collection::vec(arrival(), 1..60)
    ) {
        arrivals.sort_by_key(|arrival| arrival.at_step);
        let run = simulate(&arrivals);
        for (id, began) in &run.began {
            let overtaking = |other: &&SequenceId| **other > *id && run.began[other] < *began;
            let came = arrivals[id.0 as usize].at_step;
            let later = run.began.keys().filter(overtaking).count();
            // Beside those that were patient with it, some may have overtaken what prefilled: at most one for each quarter of it.
            let most = PATIENCE as usize + 4 * id.0 as usize + 4;
            prop_assert!(later <= most, "{id:?} came at {came}, {later} later ones began before it");
        }
    }
}

fn one(at_step: usize, flops: f64, kept: u64) -> Arrival {
    Arrival { at_step, flops, kept, transient: 0, query_passes: 1, tokens: 3 }
}

#[test]
fn a_short_context_overtakes_a_long_one_between_two_layers() {
    let run = simulate(&[one(0, 400.0, 10), one(2, 10.0, 10)]);
    let at = |step: &Step| run.steps.iter().position(|other| other == step).unwrap();
    let last_of = |id| run.steps.iter().rposition(|step| *step == Step::Layer(SequenceId(id))).unwrap();
    assert!(at(&Step::Begin(SequenceId(1))) < last_of(0));
    assert!(last_of(1) < last_of(0));
}

#[test]
fn short_contexts_that_keep_coming_take_at_most_half_of_a_long_ones_time() {
    let mut arrivals = vec![one(0, 100.0, 10)];
    arrivals.extend((0..60).map(|step| one(1 + step, 20.0, 1)));
    let run = simulate(&arrivals);
    let last = run.steps.iter().rposition(|step| *step == Step::Layer(SequenceId(0))).unwrap();
    let others = run.steps[..last].iter().filter(|step| matches!(step, Step::Layer(id) if id.0 > 0)).count();
    let (own, of_others) = (100.0 * LAYERS as f64, 20.0 * others as f64);
    assert!(of_others > 0.0 && of_others <= own + 20.0 * LAYERS as f64, "{of_others} beside {own}");
}

#[test]
fn after_a_long_layer_several_steps_are_due() {
    let mut generating = one(0, 1.0, 1);
    generating.tokens = 40;
    let run = simulate(&[generating, one(1, 1000.0, 1)]);
    let begin = run.steps.iter().position(|step| *step == Step::Begin(SequenceId(1))).unwrap();
    let layer = begin + run.steps[begin..].iter().position(|step| matches!(step, Step::Layer(_))).unwrap();
    let steps = run.steps[layer + 1..].iter().take_while(|step| matches!(step, Step::Generate(_))).count();
    // A tenth of a second of steps of a hundredth.
    assert!((9..=11).contains(&steps), "{steps}");
}

#[test]
fn one_that_found_no_room_waits_before_all_others() {
    let mut schedule = Schedule::new(limits());
    let id = SequenceId;
    schedule.add(id(0), needs(&one(0, 1.0, 60)));
    schedule.add(id(1), needs(&one(0, 1.0, 30)));
    assert_eq!(schedule.next(BUDGET), Step::Begin(id(0)));
    schedule.put_back(id(0));
    assert!(schedule.is_idle());
    schedule.add(id(2), needs(&one(0, 1.0, 10)));
    assert_eq!(schedule.next(50), Step::Refuse(id(0)), "it does not fit into what there is now");
    assert_eq!(schedule.next(50), Step::Begin(id(1)));
}
