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
    assert_eq!(plan.hosts[0], Host { local: 0..4096, excluded: 1024, compressed: 512, kept: None });
    assert_eq!(plan.hosts[7], Host { local: 7 * 4096..8 * 4096, excluded: 0, compressed: 0, kept: None });
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
        Just(AttentionMode::Ulysses),
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

fn any_execution() -> impl Strategy<Value = Execution> {
    let placement = prop_oneof![Just(Placement::Contiguous), Just(Placement::Paired)];
    let passing_type = prop_oneof![Just(PassingType::Native), Just(PassingType::Fp8)];
    (placement, any::<[bool; 2]>(), passing_type).prop_map(
        |(placement, [overlap, query_with_context], passing_type)| Execution {
            query_with_context,
            placement,
            overlap,
            passing_type,
        },
    )
}

prop_compose! {
    fn any_plan()(
        context in 1usize..300, query in 1usize..40, at in 0usize..300,
        mode in any_mode(), hosts in 1usize..20, anchor in prop::option::of(0usize..350), passing in prop::option::of(0usize..80),
        selector in any_selector(), query_in_anchor in prop::option::of(any::<bool>()), execution in any_execution(),
    ) -> PrefillPlan {
        let request = AttentionRequest { selector, query_in_anchor, execution, ..request(mode, hosts, anchor, passing) };
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
    fn ranks_share_all_hosts_evenly_and_only_the_surplus_is_idle(plan in any_plan(), ranks in 1usize..12) {
        let of_ranks: Vec<Vec<usize>> = (0..ranks).map(|rank| plan.hosts_of(rank, ranks)).collect();
        let mut all = of_ranks.concat();
        if plan.execution.placement == Placement::Contiguous {
            prop_assert!(all.is_sorted());
        }
        all.sort_unstable();
        prop_assert_eq!(all, (0..plan.hosts.len()).collect::<Vec<_>>());
        let active = &of_ranks[..plan.active_ranks(ranks)];
        let least = active.iter().map(Vec::len).min().unwrap();
        prop_assert!(least > 0 && active.iter().all(|hosts| hosts.len() <= least + 1 && hosts.is_sorted()));
        prop_assert!(of_ranks[active.len()..].iter().all(Vec::is_empty));
        prop_assert!(of_ranks[plan.last_rank(ranks)].contains(&(plan.hosts.len() - 1)));
    }

    #[test]
    fn paired_hosts_have_about_the_same_before_them_on_every_rank(hosts in 1usize..60, ranks in 1usize..12) {
        let plan = PrefillPlan::new(hosts * 4, 1, 0, &request(AttentionMode::Ring, hosts, None, None), CAPABILITIES).unwrap();
        let seen = |rank| plan.hosts_of(rank, ranks).iter().map(|host| host + 1).sum::<usize>();
        let work: Vec<usize> = (0..plan.active_ranks(ranks)).map(seen).collect();
        // Ranks that have no partner for their last host differ by it; rounds that are complete differ by nothing.
        let spread = work.iter().max().unwrap() - work.iter().min().unwrap();
        prop_assert!(spread <= ranks, "{:?}", work);
        if hosts.is_multiple_of(2 * ranks) {
            prop_assert_eq!(spread, 0);
            let pairs = hosts / ranks;
            prop_assert_eq!(pairs == 2, (0..ranks).all(|rank| plan.hosts_of(rank, ranks) == [rank, hosts - 1 - rank]));
        }
    }

    #[test]
    fn a_passing_block_is_what_the_hosts_before_have_compressed(plan in any_plan(), ranks in 1usize..12) {
        let rows = plan.compressed_rows(ranks);
        let mut owners = vec![None; plan.compressed()];
        for (host, rows) in rows.iter().enumerate() {
            prop_assert_eq!(rows.len(), plan.hosts[host].compressed);
            for row in rows.clone() {
                prop_assert_eq!(owners[row].replace(host), None);
            }
        }
        prop_assert!(owners.iter().all(Option::is_some));
        let counts = plan.compressed_of_ranks(ranks);
        for rank in 0..ranks {
            let first: usize = counts[..rank].iter().sum();
            let of_rank = plan.hosts_of(rank, ranks);
            prop_assert!(owners[first..first + counts[rank]].iter().flatten().all(|host| of_rank.contains(host)));
        }
        for host in 0..plan.hosts.len() {
            let runs = plan.passing_runs(host, &rows);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", runs);
            let mut seen: Vec<usize> = runs.into_iter().flatten().filter_map(|row| owners[row]).collect();
            seen.dedup();
            seen.sort_unstable();
            seen.dedup();
            let before: Vec<usize> = (0..host).filter(|before| plan.hosts[*before].compressed > 0).collect();
            prop_assert_eq!(seen, before);
        }
    }

    #[test]
    fn what_of_a_rank_is_before_a_host_are_its_first_local_rows(plan in any_plan(), ranks in 1usize..12) {
        for layout in (0..ranks).map(|rank| plan.layout(rank, ranks)) {
            let positions = layout.positions(&plan);
            for host in 0..plan.hosts.len() {
                let (before, start) = (layout.rows_before(host), plan.hosts[host].local.start as u32);
                prop_assert_eq!(before.start, layout.local_rows().start);
                let local = &positions[layout.local_rows()];
                prop_assert_eq!(before.len(), local.iter().filter(|position| **position < start).count());
            }
            let runs = layout.runs();
            prop_assert_eq!(runs.iter().map(|run| run.rows.len()).sum::<usize>(), layout.local_rows().len());
            for run in &runs {
                let rows = &positions[run.rows.clone()];
                prop_assert!(rows.windows(2).all(|pair| pair[1] == pair[0] + 1));
                prop_assert_eq!(rows[0] as usize, plan.hosts[run.first_host].local.start);
            }
        }
    }

    #[test]
    fn every_kv_head_is_one_ranks(plan in any_plan(), ranks in 1usize..12, kv_heads in 1usize..20) {
        let mut next = 0;
        for rank in 0..ranks {
            let heads = plan.kv_heads_of(rank, ranks, kv_heads);
            prop_assert_eq!(heads.start, next);
            prop_assert!(heads.len() <= kv_heads.div_ceil(plan.active_ranks(ranks)));
            next = heads.end;
        }
        prop_assert_eq!(next, kv_heads);
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
        seen.sort_unstable();
        prop_assert_eq!(seen, context);
    }

    #[test]
    fn more_ranks_never_need_more_memory_each(plan in any_plan(), ranks in 1usize..12) {
        let model = Footprint {
            layers: 3, hidden: 8, intermediate: 8, heads: 4, kv_heads: 2, head_dim: 2, vocab: 30, element_bytes: 4, kept_row_bytes: 32, scratch_bytes: 100,
        };
        // Without what a rank holds whatever the plan is: that grows with the partial results it gathers.
        let own = |rank, ranks| plan.memory_of_rank(rank, ranks, 7, &model) - model.fixed_memory(ranks, 1);
        let worst = |ranks| (0..ranks).map(|rank| own(rank, ranks)).max().unwrap();
        // What is exchanged comes on top of what a single rank needs, and parts of hosts that are dealt one by one may be uneven. So does what is attended to
        // apart from what comes of other ranks: of a plan for very few tokens that is more than a rank has less to do.
        let comes_apart = ranks == 1 && plan.execution.overlap && plan.compressed() > 0;
        let exchanges = matches!(plan.mode, AttentionMode::Ring | AttentionMode::Ulysses) || comes_apart;
        prop_assert!(exchanges || worst(ranks + 1) <= worst(ranks) + model.scratch_bytes);
    }
}

#[test]
fn fp8_is_flagged_where_something_is_passed_on_and_said_to_be_idle_elsewhere() {
    let plan = |mode| {
        let execution = Execution { passing_type: PassingType::Fp8, ..Execution::default() };
        let request = AttentionRequest { execution, ..request(mode, 4, Some(4), Some(2)) };
        PrefillPlan::new(100, 3, 0, &request, CAPABILITIES).unwrap()
    };
    let (apb, star) = (plan(AttentionMode::Apb), plan(AttentionMode::Star));
    assert!(apb.passes_in_fp8() && apb.notes.iter().any(|note| note.contains("FP8 (e4m3)")), "{:?}", apb.notes);
    let idle = star.notes.iter().any(|note| note.contains("no passing blocks to quantise"));
    assert!(!star.passes_in_fp8() && idle, "{:?}", star.notes);
}

#[test]
fn requests_and_plans_of_before_there_were_options_of_execution_still_parse() {
    let request: AttentionRequest = serde_json::from_str(r#"{"mode": "apb", "hosts": 3}"#).unwrap();
    assert_eq!(request.execution, Execution::default());
    assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"mode":"apb","hosts":3}"#);
    let mut plan = serde_json::to_value(apb(100, 3, 0, 2, 4, 2)).unwrap();
    plan.as_object_mut().unwrap().remove("execution").unwrap();
    assert_eq!(serde_json::from_value::<PrefillPlan>(plan).unwrap(), apb(100, 3, 0, 2, 4, 2));
    let partly: Execution = serde_json::from_str(r#"{"placement": "contiguous"}"#).unwrap();
    assert_eq!(partly, Execution { placement: Placement::Contiguous, ..Execution::default() });
    assert!(serde_json::from_str::<Execution>(r#"{"placing": "contiguous"}"#).is_err());
}
