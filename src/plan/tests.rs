//! What holds for every plan, whatever is asked for.

use proptest::prelude::*;

use super::*;

const CAPABILITIES: Capabilities = Capabilities { has_retaining_heads: true, max_hosts: 64 };

fn request(mode: AttentionMode, hosts: usize, anchor: Option<usize>, passing: Option<usize>) -> AttentionRequest {
    AttentionRequest { mode: Some(mode), hosts: Some(hosts), anchor, passing, ..AttentionRequest::default() }
}

fn apb(context: usize, query: usize, query_at: usize, hosts: usize, anchor: usize, passing: usize) -> PrefillPlan {
    let request = request(AttentionMode::Apb, hosts, Some(anchor), Some(passing));
    PrefillPlan::new(context, query, query_at, &request, CAPABILITIES).unwrap()
}

#[test]
fn a_plan_of_the_paper() {
    let plan = PrefillPlan::new(32 * 1024, 40, 16, &AttentionRequest::default(), CAPABILITIES).unwrap();
    assert_eq!((plan.mode, plan.hosts.len(), plan.selector), (AttentionMode::Apb, 8, Selector::RetainingHead));
    assert_eq!(plan.anchor, Some(Anchor { head: 16, has_query: true, tail: 1024 - 56, len: 1024 }));
    assert_eq!(plan.hosts[0], Host { local: 0..4096, excluded: 1024, compressed: 512 });
    assert_eq!(plan.hosts[7], Host { local: 7 * 4096..8 * 4096, excluded: 0, compressed: 0 });
    assert!(!plan.exact && plan.notes.is_empty());
}

#[test]
fn empty_hosts_are_left_out_and_said() {
    let plan = apb(10, 1, 0, 8, 2, 1);
    assert_eq!(plan.hosts.len(), 5);
    assert!(plan.notes.iter().any(|note| note.contains("5 hosts instead of 8")), "{:?}", plan.notes);
}

#[test]
fn a_query_that_does_not_fit_is_left_out_of_the_anchor_and_said() {
    let plan = apb(100, 20, 5, 4, 24, 4);
    assert_eq!(plan.anchor, Some(Anchor { head: 24, has_query: false, tail: 0, len: 24 }));
    assert!(plan.notes.iter().any(|note| note.contains("left out of the anchor")), "{:?}", plan.notes);
    assert!(apb(100, 20, 4, 4, 24, 4).anchor.unwrap().has_query);
}

#[test]
fn a_default_anchor_has_room_for_the_query() {
    let anchor = PrefillPlan::new(8192, 700, 16, &AttentionRequest::default(), CAPABILITIES).unwrap().anchor.unwrap();
    assert_eq!((anchor.len, anchor.has_query), (716, true));
}

#[test]
fn one_host_is_exact_and_has_no_anchor() {
    let plan = apb(100, 5, 0, 1, 20, 10);
    assert!(plan.exact && plan.anchor.is_none() && plan.selector == Selector::None);
}

#[test]
fn star_has_an_anchor_of_block_length_and_passes_nothing() {
    let plan = PrefillPlan::new(100, 5, 2, &request(AttentionMode::Star, 3, None, Some(9)), CAPABILITIES).unwrap();
    assert_eq!(plan.anchor, Some(Anchor { head: 34, has_query: false, tail: 0, len: 34 }));
    assert!(plan.compressed() == 0 && plan.notes.iter().any(|note| note.contains("no passing blocks")));
}

#[test]
fn requests_that_can_not_be_met_are_refused() {
    let plan = |context, query, query_at, request: AttentionRequest| {
        let capabilities = Capabilities { has_retaining_heads: false, max_hosts: 4 };
        PrefillPlan::new(context, query, query_at, &request, capabilities).unwrap_err()
    };
    let any = AttentionRequest::default();
    assert_eq!(plan(0, 1, 0, any.clone()), PlanError::EmptyContext);
    assert_eq!(plan(1, 0, 0, any.clone()), PlanError::EmptyQuery);
    assert_eq!(plan(5, 1, 6, any.clone()), PlanError::QueryAt { query_at: 6, context: 5 });
    assert!(matches!(plan(u32::MAX as usize, 1, 0, any), PlanError::TooLong { .. }));
    for hosts in [0, 5] {
        let asked = request(AttentionMode::Ring, hosts, None, None);
        assert_eq!(plan(9, 1, 0, asked), PlanError::Hosts { hosts, max_hosts: 4 });
    }
    let heads =
        AttentionRequest { selector: Some(Selector::RetainingHead), ..request(AttentionMode::Apb, 2, None, None) };
    assert_eq!(plan(9, 1, 0, heads), PlanError::NoRetainingHeads);
}

fn any_mode() -> impl Strategy<Value = AttentionMode> {
    prop_oneof![
        Just(AttentionMode::Full),
        Just(AttentionMode::Ring),
        Just(AttentionMode::Star),
        Just(AttentionMode::Apb)
    ]
}

fn any_selector() -> impl Strategy<Value = Option<Selector>> {
    prop_oneof![
        Just(None),
        Just(Some(Selector::RetainingHead)),
        Just(Some(Selector::QueryAware)),
        Just(Some(Selector::Random { seed: 1 })),
        Just(Some(Selector::None))
    ]
}

prop_compose! {
    fn any_plan()(
        context in 1usize..300, query in 1usize..40, at in 0usize..300,
        mode in any_mode(), hosts in 1usize..20, anchor in prop::option::of(0usize..350), passing in prop::option::of(0usize..80),
        selector in any_selector(), query_in_anchor in prop::option::of(any::<bool>()),
    ) -> PrefillPlan {
        let request = AttentionRequest { selector, query_in_anchor, ..request(mode, hosts, anchor, passing) };
        PrefillPlan::new(context, query, at.min(context), &request, CAPABILITIES).unwrap()
    }
}

proptest! {
    #[test]
    fn every_context_token_is_in_exactly_one_local_block(plan in any_plan()) {
        let mut next = 0;
        for host in &plan.hosts {
            prop_assert_eq!(host.local.start, next);
            prop_assert!(!host.local.is_empty());
            next = host.local.end;
        }
        prop_assert_eq!(next, plan.context);
    }

    #[test]
    fn blocks_are_even_but_for_the_last(plan in any_plan()) {
        let length = plan.hosts[0].local.len();
        prop_assert_eq!(length, plan.context.div_ceil(plan.hosts.len()));
        prop_assert!(plan.hosts.iter().rev().skip(1).all(|host| host.local.len() == length));
        prop_assert!(plan.hosts.last().unwrap().local.len() <= length);
    }

    #[test]
    fn an_anchor_is_made_of_the_contexts_first_tokens_and_at_most_once_of_the_query(plan in any_plan()) {
        let Some(anchor) = &plan.anchor else { return Ok(()) };
        let query = if anchor.has_query { plan.query } else { 0 };
        prop_assert!(anchor.len > 0 && plan.hosts.len() > 1);
        prop_assert_eq!(anchor.head + query + anchor.tail, anchor.len);
        prop_assert!(anchor.head + anchor.tail <= plan.context);
        let context: Vec<u32> = (0..plan.context as u32).collect();
        let asked: Vec<u32> = (1000..1000 + plan.query as u32).collect();
        let tokens = plan.anchor_tokens(&context, &asked);
        prop_assert_eq!(tokens.len(), anchor.len);
        let of_context: Vec<u32> = tokens.iter().copied().filter(|token| *token < 1000).collect();
        prop_assert_eq!(&of_context[..], &context[..of_context.len()]);
    }

    #[test]
    fn nothing_is_passed_on_by_the_last_host_nor_from_the_anchor(plan in any_plan()) {
        prop_assert_eq!(plan.hosts.last().unwrap().compressed, 0);
        for (index, host) in plan.hosts.iter().enumerate() {
            prop_assert!(host.compressed <= host.local.len() - host.excluded);
            let anchor = plan.anchor.as_ref().map_or(0, |anchor| anchor.len);
            prop_assert_eq!(host.excluded, if index == 0 { anchor.min(host.local.len()) } else { 0 });
        }
        prop_assert_eq!(plan.compressed() > 0, plan.selector != Selector::None);
    }

    #[test]
    fn ranks_share_all_hosts_in_order_and_only_the_surplus_is_idle(plan in any_plan(), ranks in 1usize..12) {
        let mut next = 0;
        for rank in 0..ranks {
            let hosts = plan.hosts_of(rank, ranks);
            prop_assert_eq!(hosts.start, next);
            prop_assert_eq!(hosts.is_empty(), rank >= plan.active_ranks(ranks));
            next = hosts.end;
        }
        prop_assert_eq!(next, plan.hosts.len());
    }

    #[test]
    fn rows_of_the_ranks_hold_every_token_at_its_position(plan in any_plan(), ranks in 1usize..12) {
        let context: Vec<u32> = (0..plan.context as u32).collect();
        let query: Vec<u32> = (plan.context as u32..).take(plan.query).collect();
        let mut seen = Vec::new();
        for rank in 0..ranks {
            let layout = plan.layout(rank, ranks);
            let (tokens, positions) = (layout.tokens(&plan, &context, &query), layout.positions(&plan));
            prop_assert_eq!((tokens.len(), positions.len()), (layout.rows, layout.rows));
            seen.extend_from_slice(&tokens[layout.local_rows()]);
            prop_assert_eq!(&tokens[layout.local_rows()], &positions[layout.local_rows()]);
            let anchor: Vec<u32> = (0..layout.anchor.len() as u32).collect();
            prop_assert_eq!(&positions[layout.anchor.clone()], &anchor[..]);
            for probe in layout.probes.into_iter().filter(|probe| !probe.is_empty()) {
                prop_assert_eq!(&tokens[probe.clone()], &query[..]);
                prop_assert_eq!(&positions[probe], &query[..]);
            }
        }
        prop_assert_eq!(seen, context);
    }

    #[test]
    fn more_ranks_never_need_more_memory_each(plan in any_plan(), ranks in 1usize..12) {
        let model = Footprint {
            layers: 3, hidden: 8, intermediate: 8, heads: 4, kv_heads: 2, head_dim: 2, element_bytes: 4, kept_row_bytes: 32, scratch_bytes: 100,
        };
        // Without what a rank holds whatever the plan is: that grows with the partial results it gathers.
        let own = |rank, ranks| plan.memory_of_rank(rank, ranks, 7, &model) - model.fixed_memory(ranks, QUERY_CHUNK);
        let worst = |ranks| (0..ranks).map(|rank| own(rank, ranks)).max().unwrap();
        prop_assert!(plan.mode == AttentionMode::Ring || worst(ranks + 1) <= worst(ranks) + model.scratch_bytes);
    }
}
