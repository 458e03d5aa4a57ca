//! A plan's memory is an upper bound of what its ranks allocate, and not a wild one.

use apbd::comm::local::LocalComm;
use apbd::engine::{self, Job, Rank};
use apbd::plan::{AttentionMode, Execution, Footprint, PassingType, Selector};

use super::instrumented::Instrumented;
use super::models::{GROUPED, TinyModel, cpu, distinct_tokens};
use super::oracle::Case;
use super::runs::{self, DEADLINE, Forced};
use super::strategies::EXECUTIONS;

#[test]
fn no_rank_allocates_more_than_its_plan_says() {
    let model = TinyModel::new(GROUPED, 1);
    let shape = model.spec.shape;
    let footprint = Footprint {
        layers: model.spec.layers,
        hidden: model.spec.hidden,
        intermediate: model.spec.intermediate,
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        vocab: model.spec.vocab,
        element_bytes: 4,
        kept_row_bytes: 2 * shape.kv_width() * size_of::<f32>(),
        scratch_bytes: 0,
    };
    let modes =
        [AttentionMode::Full, AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star, AttentionMode::Apb];
    let mut executions = EXECUTIONS.to_vec();
    executions.push(Execution { passing_type: PassingType::Fp8, ..Execution::default() });
    let with_selector = |selector| modes.iter().map(move |mode| (*mode, selector));
    let strategies = [Selector::RetainingHead, Selector::QueryAware].into_iter().flat_map(with_selector);
    for ((mode, selector), execution) in strategies.flat_map(|strategy| executions.iter().map(move |e| (strategy, *e)))
    {
        let case = Case {
            mode,
            hosts: 6,
            anchor: 14,
            passing: 4,
            query_at: 2,
            query_in_anchor: true,
            selector,
            kv_budget: KV_BUDGETS[mode as usize % 2],
            execution,
        };
        for count in [1, 2, 3, 8] {
            check(&model, &footprint, &case, count);
        }
    }
}

/// Of some modes everything is kept, of others a part.
const KV_BUDGETS: [Option<usize>; 2] = [None, Some(50)];

fn check(model: &TinyModel, footprint: &Footprint, case: &Case, count: usize) {
    let all = distinct_tokens(127, 1);
    let (context, query) = all.split_at(120);
    let plan = runs::plan(case, context.len(), query.len());
    let job = Job { context, query, plan: &plan, new_tokens: 5 };
    let backends: Vec<Instrumented> = (0..count).map(|_| Instrumented::new(cpu(), None)).collect();
    let weights = model.weights(&backends[0]);
    let ranks = backends.iter().zip(LocalComm::group(count, DEADLINE));
    let ranks = ranks.map(|(backend, comm)| Rank { backend, comm, weights: &weights, spec: &model.spec }).collect();
    engine::run(ranks, &job, &mut Forced::new(&[1])).unwrap();
    let fixed = footprint.fixed_memory(count, 1);
    for (rank, backend) in backends.iter().enumerate() {
        let needed = plan.memory_of_rank(rank, count, 5, footprint) - fixed;
        // Everything is taken when the sequence begins; a pass takes nothing.
        let [taken, later] = backend.allocated();
        assert_eq!(later, 0, "{case:?} rank {rank} of {count}");
        let used = taken - fixed;
        assert!(used <= needed && needed <= used + used / 10, "{case:?} rank {rank} of {count}: {used} of {needed}");
    }
}
