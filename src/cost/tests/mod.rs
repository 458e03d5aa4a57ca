//! Counted work against the formulas of the paper, and the laws that predictions have to follow.

mod measured;
mod two_gpus;

use super::{Calibration, CostModel, Exchange, LayerWork, ModelShape, PrefillCost};
use crate::plan::{AttentionMode, AttentionRequest, Capabilities, Execution, Placement, PrefillPlan, Selector};

const K: usize = 1024;

fn llama() -> ModelShape {
    ModelShape::published("llama-3.1-8b", 1024).expect("a shape")
}

fn planned(
    mode: AttentionMode,
    context: usize,
    hosts: usize,
    anchor: Option<usize>,
    passing: Option<usize>,
) -> PrefillPlan {
    // The query after its context, as when the figures were measured, and as the formulas of the paper have it.
    let execution = Execution { query_with_context: false, ..Execution::default() };
    let (mode, hosts) = (Some(mode), Some(hosts));
    let request = AttentionRequest { mode, hosts, anchor, passing, execution, ..AttentionRequest::default() };
    let capabilities = Capabilities { has_retaining_heads: true, max_hosts: 4096 };
    PrefillPlan::new(context, 64, 0, &request, capabilities).expect("a plan")
}

fn plan(mode: AttentionMode, context: usize, hosts: usize) -> PrefillPlan {
    planned(mode, context, hosts, None, None)
}

fn placed(mut plan: PrefillPlan, placement: Placement) -> PrefillPlan {
    plan.execution.placement = placement;
    plan
}

fn executions() -> impl Iterator<Item = (AttentionMode, Placement)> {
    use AttentionMode::{Apb, Full, Ring, Star, Ulysses};
    let placements = [Placement::Contiguous, Placement::Paired];
    [Full, Ring, Ulysses, Star, Apb].into_iter().flat_map(move |mode| placements.map(|placement| (mode, placement)))
}

/// Of all layers, the last one as whole as the others: the paper's formulas do not know that nothing is read of it.
fn flops_of_all_layers(plan: &PrefillPlan, ranks: usize) -> f64 {
    let shape = ModelShape { head_width: 0, ..llama() };
    shape.layers as f64 * LayerWork::of(plan, ranks, &shape).flops()
}

/// FLOPs as the paper has them; `passing` times the pairs of passing blocks.
fn of_the_paper(n: f64, hosts: f64, anchor: f64, passing: f64) -> f64 {
    let (layers, d, g, i) = (32.0, 4096.0, 4.0, 14_336.0);
    let block = n / hosts;
    let row = |seen: f64| 4.0 * (1.0 + 1.0 / g + 0.5 * seen / d + 1.5 * i / d) * d * d;
    let rows = block + anchor;
    layers * (row(block) * block + (hosts - 1.0) * row(rows) * rows + passing * hosts * (hosts - 1.0) * rows * d)
}

fn assert_near(counted: f64, expected: f64, tolerance: f64) {
    assert!((counted / expected - 1.0).abs() < tolerance, "{counted:e} is not {expected:e}");
}

#[test]
fn counted_flops_are_those_of_the_papers_formulas() {
    let n = (128 * K) as f64;
    let full = flops_of_all_layers(&plan(AttentionMode::Full, 128 * K, 1), 1);
    assert_near(full, of_the_paper(n, 1.0, 0.0, 0.0), 1e-4);
    assert_near(full, 6.33e15, 2e-3);
    let star = flops_of_all_layers(&plan(AttentionMode::Star, 128 * K, 8), 8);
    assert_near(star, of_the_paper(n, 8.0, n / 8.0, 0.0), 1e-4);
    assert_near(star, 5.47e15, 2e-3);
    // For passing blocks the formula has one FLOP where a pair takes two multiplications and two additions, of which the causal half over the hosts
    // leaves two; and it lets the anchor see them, which it does not. Without them both agree, with them the count is the larger.
    let apb = plan(AttentionMode::Apb, 128 * K, 8);
    let without = PrefillPlan {
        hosts: apb.hosts.iter().map(|host| crate::plan::Host { compressed: 0, ..host.clone() }).collect(),
        selector: Selector::None,
        ..apb.clone()
    };
    let (anchor, passing) = (4096.0, 2048.0);
    let base = flops_of_all_layers(&without, 8);
    assert_near(base, of_the_paper(n, 8.0, anchor, 0.0), 1e-4);
    assert_near(of_the_paper(n, 8.0, anchor, passing), 3.38e15, 2e-3);
    let pairs = 28.0 * passing * n / 8.0;
    assert_near(flops_of_all_layers(&apb, 8) - base, 32.0 * 4.0 * 4096.0 * pairs, 1e-6);
}

#[test]
fn one_rank_computes_the_anchor_once() {
    let apb = plan(AttentionMode::Apb, 128 * K, 8);
    let (one, eight) = (LayerWork::of(&apb, 1, &llama()), LayerWork::of(&apb, 8, &llama()));
    assert_eq!(one.ranks[0].rows, 128 * K + 4 * K);
    assert_eq!(eight.ranks.iter().map(|rank| rank.rows).sum::<usize>(), 128 * K + 7 * 4 * K);
    assert_eq!((one.exchange, eight.exchange != Exchange::Nothing), (Exchange::Nothing, true));
    assert!(one.flops() < eight.flops());
}

#[test]
fn exact_strategies_do_the_work_of_full_attention_whatever_their_ranks() {
    let full = LayerWork::of(&plan(AttentionMode::Full, 64 * K, 1), 1, &llama()).flops();
    for (mode, placement) in executions() {
        let plan = placed(plan(mode, 64 * K, 16), placement);
        for ranks in [1, 2, 3, 5, 8, 16] {
            if mode.is_exact() {
                assert_near(LayerWork::of(&plan, ranks, &llama()).flops(), full, 1e-9);
            }
        }
    }
}

#[test]
fn pairs_of_hosts_balance_the_ranks() {
    let model = CostModel::new(llama(), Calibration::h100());
    for mode in [AttentionMode::Ring, AttentionMode::Apb] {
        let contiguous = placed(plan(mode, 256 * K, 16), Placement::Contiguous);
        let paired = placed(contiguous.clone(), Placement::Paired);
        let seconds = |plan: &PrefillPlan| model.prefill(plan, 8).seconds;
        assert!(seconds(&paired) < 0.95 * seconds(&contiguous), "{mode:?}");
        let busy: Vec<f64> = model.prefill(&paired, 8).ranks.iter().map(|rank| rank.stages.busy_s()).collect();
        let (least, most) = (busy.iter().copied().fold(f64::MAX, f64::min), busy.iter().copied().fold(0.0, f64::max));
        assert!(least > 0.9 * most, "{mode:?}: {busy:?}");
    }
}

#[test]
fn what_is_not_hidden_is_waited_for() {
    let mut model = CostModel::new(llama(), Calibration::h100());
    model.calibration.network.within.gb_s = 20.0;
    for mode in [AttentionMode::Ring, AttentionMode::Apb] {
        let hidden = plan(mode, 128 * K, 8);
        let mut shown = hidden.clone();
        shown.execution.overlap = false;
        let (hidden, shown) = (model.prefill(&hidden, 8), model.prefill(&shown, 8));
        assert!(hidden.seconds < shown.seconds, "{mode:?}");
        let hides = |cost: &PrefillCost| cost.ranks.iter().map(|rank| rank.stages.communication_hidden_s).sum::<f64>();
        assert!(hides(&hidden) > 0.0 && hides(&shown) < 1e-9, "{mode:?}");
    }
}

#[test]
fn the_stages_of_a_rank_are_all_its_time() {
    let model = CostModel::new(llama(), Calibration::h100());
    for (mode, placement) in executions() {
        for ranks in [1, 2, 3, 8] {
            let cost = model.prefill(&placed(plan(mode, 64 * K, 16), placement), ranks);
            let slowest = cost.ranks.iter().map(|rank| rank.stages.seconds()).fold(0.0, f64::max);
            assert_near(slowest, cost.seconds, 1e-9);
            assert!(cost.ranks.iter().all(|rank| rank.rows == 0 || rank.stages.busy_s() > 0.0));
        }
    }
}

#[test]
fn more_ranks_are_faster_and_a_slower_network_is_not() {
    let model = CostModel::new(llama(), Calibration::h100());
    let mut slow = model.clone();
    slow.calibration.network.within.gb_s = 1.0;
    for mode in [AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star, AttentionMode::Apb] {
        let plan = plan(mode, 256 * K, 8);
        let seconds = |model: &CostModel, ranks| model.prefill(&plan, ranks).seconds;
        assert!(seconds(&model, 8) < seconds(&model, 4) && seconds(&model, 4) < seconds(&model, 1), "{mode:?}");
        assert!(seconds(&slow, 8) >= seconds(&model, 8), "{mode:?}");
        assert_eq!(seconds(&slow, 1), seconds(&model, 1), "{mode:?}");
    }
}

#[test]
fn a_query_with_its_context_saves_a_pass_over_the_weights() {
    let model = CostModel::new(llama(), Calibration::h100());
    for ranks in [1, 2, 8] {
        let after = plan(AttentionMode::Apb, 32 * K, 8);
        let mut with = after.clone();
        with.execution.query_with_context = true;
        assert!(model.prefill(&with, ranks).seconds > model.prefill(&after, ranks).seconds);
        let (after, with) = (model.document(&after, ranks, 1), model.document(&with, ranks, 1));
        assert!(with.prefill_s < after.prefill_s && with.seconds() < after.seconds(), "{after:?} {with:?}");
    }
}

#[test]
fn a_batch_reads_the_weights_once() {
    let model = CostModel::new(llama(), Calibration::h100());
    let (one, eight) = (model.decode_step_s(&[32 * K], 1), model.decode_step_s(&[32 * K; 8], 1));
    assert!(one < eight && eight < 3.0 * one, "{one} {eight}");
}
