//! Logits of the engine equal those of the oracle, for every way to cut a context and to spread it over ranks.

use apbd::plan::{AttentionMode, Execution, PassingType, Placement, Selector};

use proptest::prelude::*;

use super::models::{GROUPED, MULTI_QUERY, TinyModel, Variant, distinct_tokens};
use super::oracle::{self, Case};
use super::runs;

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];
const SELECTORS: [Selector; 4] =
    [Selector::RetainingHead, Selector::QueryAware, Selector::Random { seed: 5 }, Selector::None];
/// Every way to carry a plan out that has to give the same.
pub const EXECUTIONS: [Execution; 4] = [
    execution(Placement::Contiguous, true),
    execution(Placement::Contiguous, false),
    execution(Placement::Paired, true),
    execution(Placement::Paired, false),
];
/// Of the largest logit.
const TOLERANCE: f64 = 2e-5;
/// The same where elements are rounded to four bits on their way: some, all of them small, fall the other way in f32.
const FP8_TOLERANCE: f64 = 5e-4;
/// Choices that are closer than this may fall the other way in f32.
const CLEAR_MARGIN: f64 = 1e-5;

const fn execution(placement: Placement, overlap: bool) -> Execution {
    // Both are switched together, so that each way of one is seen with each way of the other somewhere.
    Execution { placement, overlap, passing_type: PassingType::Native, query_with_context: overlap }
}

struct Tokens {
    context: Vec<u32>,
    query: Vec<u32>,
    forced: Vec<u32>,
}

impl Tokens {
    fn new(context: usize, query: usize, seed: u64) -> Self {
        let mut all = distinct_tokens(context + query, seed);
        let query = all.split_off(context);
        Self { context: all, query, forced: vec![3, 141, 59] }
    }
}

/// The oracle's logits for the first seed at which its choices are clear, and what they are for.
fn clear_case(variant: Variant, context: usize, query: usize, case: &Case) -> (TinyModel, Tokens, Vec<Vec<f64>>) {
    for seed in 1..20 {
        let (model, tokens) = (TinyModel::new(variant, seed), Tokens::new(context, query, seed));
        let answer = oracle::answer(&model, &tokens.context, &tokens.query, &tokens.forced, case);
        if answer.margin > CLEAR_MARGIN {
            return (model, tokens, answer.logits);
        }
    }
    panic!("no seed gives clear choices for {case:?}");
}

fn check(variant: Variant, context: usize, query: usize, case: &Case) {
    let (model, tokens, expected) = clear_case(variant, context, query, case);
    for (ranks, execution) in
        RANKS.iter().flat_map(|ranks| EXECUTIONS.iter().map(move |execution| (*ranks, *execution)))
    {
        let case = &Case { execution, ..case.clone() };
        let got = runs::logits(&model, &tokens.context, &tokens.query, &tokens.forced, case, ranks);
        assert_eq!(got.len(), expected.len());
        for (step, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = relative_error(got, expected);
            assert!(error < TOLERANCE, "{case:?}, {ranks} ranks, step {step}: relative error {error:e}");
        }
    }
}

pub fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    got.iter().zip(expected).map(|(got, expected)| (f64::from(*got) - expected).abs()).fold(0.0, f64::max) / largest
}

fn case(mode: AttentionMode, hosts: usize, selector: Selector) -> Case {
    Case {
        mode,
        hosts,
        anchor: 13,
        passing: 3,
        query_at: 2,
        query_in_anchor: true,
        selector,
        kv_budget: None,
        execution: Execution::default(),
    }
}

#[test]
fn a_budget_of_keys_and_values_is_kept_by_the_retaining_heads() {
    for (mode, hosts) in [(AttentionMode::Full, 1), (AttentionMode::Star, 4), (AttentionMode::Apb, 5)] {
        for budget in [1, 9, 40, 60] {
            check(GROUPED, 61, 7, &Case { kv_budget: Some(budget), ..case(mode, hosts, Selector::RetainingHead) });
        }
    }
    let with = |budget| Case { kv_budget: budget, ..case(AttentionMode::Apb, 5, Selector::QueryAware) };
    let (model, tokens) = (TinyModel::new(GROUPED, 4), Tokens::new(61, 7, 4));
    let logits = |budget| runs::logits(&model, &tokens.context, &tokens.query, &[], &with(budget), 2);
    assert_eq!(logits(Some(61)), logits(None), "a budget for all is none");
    assert!(!runs::plan(&with(Some(60)), 61, 7).exact);
}

#[test]
fn full_attention() {
    for variant in [GROUPED, MULTI_QUERY] {
        check(variant, 61, 7, &case(AttentionMode::Full, 1, Selector::None));
        check(variant, 1, 1, &Case { query_at: 0, ..case(AttentionMode::Full, 1, Selector::None) });
    }
}

#[test]
fn ring_equals_full_for_every_number_of_hosts() {
    for hosts in 1..=8 {
        check(GROUPED, 61, 7, &case(AttentionMode::Ring, hosts, Selector::None));
    }
    check(MULTI_QUERY, 30, 4, &case(AttentionMode::Ring, 5, Selector::None));
}

#[test]
fn ulysses_equals_full_for_every_number_of_hosts_and_of_heads() {
    for hosts in 1..=8 {
        check(GROUPED, 61, 7, &case(AttentionMode::Ulysses, hosts, Selector::None));
    }
    // Fewer heads than ranks, and more.
    check(MULTI_QUERY, 30, 4, &case(AttentionMode::Ulysses, 5, Selector::None));
    let many = Variant { heads: 10, kv_heads: 5, ..GROUPED };
    check(many, 41, 4, &case(AttentionMode::Ulysses, 6, Selector::None));
}

#[test]
fn star_for_every_number_of_hosts() {
    for hosts in 1..=8 {
        check(GROUPED, 61, 7, &case(AttentionMode::Star, hosts, Selector::None));
    }
    check(MULTI_QUERY, 30, 4, &case(AttentionMode::Star, 5, Selector::None));
}

#[test]
fn apb_for_every_selector_and_number_of_hosts() {
    for selector in SELECTORS {
        for hosts in 1..=8 {
            check(GROUPED, 93, 7, &case(AttentionMode::Apb, hosts, selector));
        }
    }
}

#[test]
fn apb_with_one_kv_head_and_biases() {
    for selector in SELECTORS {
        for hosts in [2, 5, 8] {
            check(MULTI_QUERY, 70, 5, &case(AttentionMode::Apb, hosts, selector));
        }
    }
}

#[test]
fn apb_without_the_query_in_the_anchor() {
    for selector in SELECTORS {
        check(GROUPED, 50, 6, &Case { query_in_anchor: false, ..case(AttentionMode::Apb, 4, selector) });
    }
}

#[test]
fn apb_with_a_query_longer_than_the_anchor() {
    for selector in SELECTORS {
        check(GROUPED, 50, 20, &case(AttentionMode::Apb, 4, selector));
    }
}

#[test]
fn apb_without_an_anchor() {
    for selector in SELECTORS {
        check(GROUPED, 50, 6, &Case { anchor: 0, query_at: 0, ..case(AttentionMode::Apb, 4, selector) });
    }
}

#[test]
fn passing_blocks_in_fp8_on_any_number_of_ranks() {
    // Of two layers the first alone passes something on: one code that falls the other way does not bring others about.
    let variant = Variant { layers: 2, ..GROUPED };
    for (selector, hosts) in
        [(Selector::RetainingHead, 3), (Selector::QueryAware, 6), (Selector::Random { seed: 5 }, 8)]
    {
        let native = case(AttentionMode::Apb, hosts, selector);
        let fp8 = |execution| Execution { passing_type: PassingType::Fp8, ..execution };
        let quantised = Case { execution: fp8(native.execution), ..native.clone() };
        let (model, tokens, expected) = clear_case(variant, 93, 7, &quantised);
        let logits =
            |case: &Case, ranks| runs::logits(&model, &tokens.context, &tokens.query, &tokens.forced, case, ranks);
        for (ranks, execution) in RANKS.iter().flat_map(|ranks| EXECUTIONS.map(|execution| (*ranks, fp8(execution)))) {
            let got = logits(&Case { execution, ..native.clone() }, ranks);
            for (step, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let error = relative_error(got, expected);
                assert!(error < FP8_TOLERANCE, "{hosts} hosts, {ranks} ranks, {execution:?}, step {step}: {error:e}");
            }
        }
        let cost = relative_error(&logits(&native, 2)[0], &expected[0]);
        assert!(cost > 5.0 * FP8_TOLERANCE, "{hosts} hosts: the codes change the logits by {cost:e} only");
    }
}

#[test]
fn apb_at_its_edges() {
    let apb =
        |hosts, anchor, passing| Case { anchor, passing, ..case(AttentionMode::Apb, hosts, Selector::RetainingHead) };
    // More hosts than tokens, blocks of one token.
    check(GROUPED, 5, 3, &apb(8, 5, 1));
    // The last block has one token.
    check(GROUPED, 36, 3, &apb(8, 5, 2));
    // Blocks shorter than the passing length and than the anchor.
    check(GROUPED, 40, 3, &apb(8, 30, 50));
    // An anchor longer than context and query together.
    check(GROUPED, 12, 3, &apb(3, 40, 2));
}

#[test]
fn a_query_of_several_chunks_equals_the_oracle() {
    let (variant, case) = (GROUPED, case(AttentionMode::Apb, 3, Selector::None));
    let model = TinyModel::new(variant, 1);
    let tokens = Tokens::new(40, 5, 1);
    // Longer than a chunk; tokens may repeat where nothing is chosen by score.
    let query: Vec<u32> = tokens.query.iter().copied().cycle().take(apbd::plan::QUERY_CHUNK + 40).collect();
    let expected = oracle::answer(&model, &tokens.context, &query, &tokens.forced, &case).logits;
    let got = runs::logits(&model, &tokens.context, &query, &tokens.forced, &case, 2);
    for (got, expected) in got.iter().zip(&expected) {
        assert!(relative_error(got, expected) < TOLERANCE);
    }
}

#[test]
fn the_same_number_of_ranks_gives_the_same_bits() {
    let model = TinyModel::new(GROUPED, 3);
    let tokens = Tokens::new(93, 7, 3);
    let modes =
        [AttentionMode::Full, AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star, AttentionMode::Apb];
    for (mode, execution) in modes.iter().flat_map(|mode| EXECUTIONS.iter().map(move |execution| (*mode, *execution))) {
        for ranks in RANKS {
            let case = Case { execution, ..case(mode, 8, Selector::RetainingHead) };
            let run = || runs::logits(&model, &tokens.context, &tokens.query, &tokens.forced, &case, ranks);
            assert_eq!(run(), run(), "{mode:?} on {ranks} ranks");
        }
    }
}

#[test]
fn selectors_and_anchors_change_the_result() {
    // Else the comparisons with the oracle would prove less than they seem to.
    let model = TinyModel::new(GROUPED, 3);
    let tokens = Tokens::new(93, 7, 3);
    let logits = |case: &Case| runs::logits(&model, &tokens.context, &tokens.query, &[], case, 2).remove(0);
    let apb = case(AttentionMode::Apb, 6, Selector::RetainingHead);
    let base: Vec<f64> = logits(&apb).into_iter().map(f64::from).collect();
    let mut others: Vec<Case> =
        SELECTORS[1..].iter().map(|selector| Case { selector: *selector, ..apb.clone() }).collect();
    others.push(Case { query_in_anchor: false, ..apb.clone() });
    others.push(Case { kv_budget: Some(12), ..apb.clone() });
    others.push(Case { mode: AttentionMode::Full, ..apb.clone() });
    others.push(Case { mode: AttentionMode::Star, ..apb });
    for other in others {
        let difference = relative_error(&logits(&other), &base);
        assert!(difference > 10.0 * TOLERANCE, "{other:?}: {difference:e}");
    }
}

prop_compose! {
    fn any_case()(
        hosts in 1usize..10, anchor in 0usize..60, passing in 0usize..14, query_at in 0usize..10, query_in_anchor in any::<bool>(),
        mode in prop::sample::select(vec![
            AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star, AttentionMode::Apb, AttentionMode::Apb, AttentionMode::Apb,
        ]),
        selector in prop::sample::select(SELECTORS.to_vec()), execution in prop::sample::select(EXECUTIONS.to_vec()),
        budget in prop::option::weighted(0.3, 1usize..120),
    ) -> Case {
        // The oracle knows one host of ring and Ulysses, a plan has several, each with its own part of the budget.
        let kv_budget = budget.filter(|_| !matches!(mode, AttentionMode::Ring | AttentionMode::Ulysses));
        Case { mode, hosts, anchor, passing, query_at, query_in_anchor, selector, kv_budget, execution }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_on_any_number_of_ranks(
        case in any_case(), context in 1usize..100, query in 1usize..20, ranks in 1usize..10, seed in 0u64..1000,
    ) {
        let case = Case { query_at: case.query_at.min(context), ..case };
        let (model, tokens) = (TinyModel::new(GROUPED, seed), Tokens::new(context, query, seed));
        let expected = oracle::answer(&model, &tokens.context, &tokens.query, &tokens.forced, &case);
        prop_assume!(expected.margin > CLEAR_MARGIN);
        let got = runs::logits(&model, &tokens.context, &tokens.query, &tokens.forced, &case, ranks);
        for (got, expected) in got.iter().zip(&expected.logits) {
            let error = relative_error(got, expected);
            prop_assert!(error < TOLERANCE, "relative error {:e}", error);
        }
    }
}
