//! What the cost model counts is what the layer loop asks of a backend, to the last operation.

use apbd::comm::local::LocalComm;
use apbd::cost::{LayerWork, ModelShape};
use apbd::engine::{self, Job, Rank};
use apbd::plan::{AttentionMode, Selector};

use super::instrumented::Instrumented;
use super::models::{GROUPED, RETAINING_WIDTH, TinyModel, cpu, distinct_tokens};
use super::oracle::Case;
use super::runs::{self, DEADLINE, Forced};
use super::strategies::EXECUTIONS;

const SELECTORS: [Selector; 3] = [Selector::RetainingHead, Selector::QueryAware, Selector::Random { seed: 1 }];

#[test]
fn a_prefill_takes_the_operations_that_are_counted_for_it() {
    let model = TinyModel::new(GROUPED, 1);
    let modes =
        [AttentionMode::Full, AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star, AttentionMode::Apb];
    let budgets = [None, Some(50)];
    for (mode, execution) in modes.iter().flat_map(|mode| EXECUTIONS.map(|execution| (*mode, execution))) {
        for (selector, kv_budget) in SELECTORS.iter().flat_map(|selector| budgets.map(|budget| (*selector, budget))) {
            let (hosts, anchor, passing, query_at, query_in_anchor) = (6, 14, 4, 2, true);
            let case = Case { mode, hosts, anchor, passing, query_at, query_in_anchor, selector, execution, kv_budget };
            for ranks in [1, 2, 3, 8] {
                check(&model, &case, ranks);
            }
        }
    }
}

fn check(model: &TinyModel, case: &Case, ranks: usize) {
    let all = distinct_tokens(127, 1);
    let (context, query) = all.split_at(120);
    let plan = runs::plan(case, context.len(), query.len());
    let job = Job { context, query, plan: &plan, new_tokens: 1 };
    let backends: Vec<Instrumented> = (0..ranks).map(|_| Instrumented::new(cpu(), None)).collect();
    let weights = model.weights(&backends[0]);
    let members = backends.iter().zip(LocalComm::group(ranks, DEADLINE));
    let members = members.map(|(backend, comm)| Rank { backend, comm, weights: &weights, spec: &model.spec }).collect();
    engine::run(members, &job, &mut Forced::new(&[])).unwrap();
    let work = LayerWork::of(&plan, ranks, &shape(model));
    for (rank, backend) in backends.iter().enumerate() {
        let work = &work.ranks[rank];
        let counted = (model.spec.layers - 1) as f64 * work.flops() + work.last_flops();
        let [asked, _] = backend.flops();
        assert_eq!(counted, asked as f64, "{case:?} rank {rank} of {ranks}");
    }
}

fn shape(model: &TinyModel) -> ModelShape {
    let (spec, heads) = (&model.spec, model.spec.shape);
    ModelShape {
        layers: spec.layers,
        hidden: spec.hidden,
        intermediate: spec.intermediate,
        heads: heads.heads,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        vocab: spec.vocab,
        tied_embeddings: spec.tied_embeddings,
        head_width: RETAINING_WIDTH,
        element_bytes: size_of::<f32>(),
        kept_row_bytes: 2 * heads.kv_width() * size_of::<f32>(),
        scratch_bytes: 0,
    }
}
