//! A rank that fails, panics or is cancelled ends all ranks, at once and with the right reason.

use apbd::backend::{Backend, BackendError};
use apbd::comm::local::LocalComm;
use apbd::engine::{self, Driver, EngineError, Job, Progress, Rank};
use apbd::generate::generator::Generator;
use apbd::generate::{GenerationOptions, generator::Step};
use apbd::plan::{AttentionMode, Execution, PassingType, Placement, Selector};

use super::instrumented::{Fault, Instrumented};
use super::models::{GROUPED, TinyModel, cpu, distinct_tokens};
use super::oracle::Case;
use super::runs::{self, DEADLINE, Forced};

const APB: Case = Case {
    mode: AttentionMode::Apb,
    hosts: 6,
    anchor: 12,
    passing: 3,
    query_at: 2,
    query_in_anchor: true,
    kv_budget: None,
    selector: Selector::RetainingHead,
    execution: Execution {
        placement: Placement::Contiguous,
        overlap: true,
        passing_type: PassingType::Native,
        query_with_context: false,
    },
};

/// Runs with a fault on one of three ranks; gives the error, or the operations of that rank.
fn run_with(
    case: &Case,
    rank: usize,
    fault: Option<(usize, Fault)>,
    driver: &mut dyn Driver,
) -> Result<usize, EngineError> {
    let model = TinyModel::new(GROUPED, 1);
    let all = distinct_tokens(67, 1);
    let (context, query) = all.split_at(60);
    let plan = runs::plan(case, context.len(), query.len());
    let job = Job { context, query, plan: &plan, new_tokens: 4 };
    let backends: Vec<Instrumented> =
        (0..3).map(|index| Instrumented::new(cpu(), fault.filter(|_| index == rank))).collect();
    let weights = model.weights(&backends[0]);
    let ranks = backends.iter().zip(LocalComm::group(3, DEADLINE));
    let ranks = ranks.map(|(backend, comm)| Rank { backend, comm, weights: &weights, spec: &model.spec }).collect();
    engine::run(ranks, &job, driver)?;
    Ok(backends[rank].calls())
}

#[test]
fn an_error_at_any_call_of_any_rank_ends_all_ranks_with_its_reason() {
    for mode in [AttentionMode::Apb, AttentionMode::Ring, AttentionMode::Ulysses] {
        let case = Case { mode, ..APB };
        for rank in 0..3 {
            let calls = run_with(&case, rank, None, &mut Forced::new(&[1, 2])).unwrap();
            for call in (0..calls).step_by(7) {
                let error = run_with(&case, rank, Some((call, Fault::Error)), &mut Forced::new(&[1, 2])).unwrap_err();
                assert!(matches!(&error, EngineError::Device { reason } if reason.contains("injected")), "{error:?}");
            }
        }
    }
}

#[test]
fn a_panic_on_any_rank_ends_all_ranks_and_is_named() {
    for rank in 0..3 {
        let error = run_with(&APB, rank, Some((20, Fault::Panic)), &mut Forced::new(&[])).unwrap_err();
        let named = format!("apbd-rank-{rank} panicked: injected");
        assert!(matches!(&error, EngineError::Device { reason } if *reason == named), "{error:?}");
    }
}

#[test]
fn cancelling_stops_between_layers_and_between_tokens() {
    let mut through = Forced::new(&[1, 2, 3]);
    run_with(&APB, 0, None, &mut through).unwrap();
    let prefill = |layers_done| Progress::Prefill { layers_done, layers: 3 };
    let generate = |tokens| Progress::Generate { tokens, at_most: 4 };
    let expected = [prefill(0), prefill(1), prefill(2), prefill(3), generate(1), generate(2), generate(3)];
    assert_eq!(through.reports, expected);
    for at in 0..expected.len() {
        let mut driver = Forced::new(&[1, 2, 3]);
        driver.cancel_at = Some(at);
        assert_eq!(run_with(&APB, 0, None, &mut driver).unwrap_err(), EngineError::Cancelled);
        assert_eq!(driver.reports, expected[..=at]);
    }
}

/// Generation as it is for a real request.
struct Generating<'a>(Generator<'a>);

impl Driver for Generating<'_> {
    fn progress(&mut self, _: Progress) -> bool {
        true
    }
    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        self.0.next(logits).map_err(|error| EngineError::Model { reason: error.to_string() })
    }
}

#[test]
fn logits_that_are_not_finite_are_the_models_error_and_hang_no_rank() {
    let options = GenerationOptions::default();
    let text = |_: &[u32]| String::new();
    let mut driver = Generating(Generator::new(&options, &[], None, &text));
    let error = run_with(&APB, 0, Some((0, Fault::NonFinite)), &mut driver).unwrap_err();
    assert!(matches!(&error, EngineError::Model { reason } if reason.contains("logit 1 of 160 is NaN")), "{error:?}");
}

#[test]
fn a_missing_rank_is_an_error_and_no_hang() {
    let model = TinyModel::new(GROUPED, 1);
    let all = distinct_tokens(67, 1);
    let plan = runs::plan(&APB, 60, 7);
    let job = Job { context: &all[..60], query: &all[60..], plan: &plan, new_tokens: 4 };
    let backend = cpu();
    let weights = model.weights(&backend);
    let mut comms = LocalComm::group(2, DEADLINE);
    drop(comms.pop());
    let rank = Rank { backend: &backend, comm: comms.remove(0), weights: &weights, spec: &model.spec };
    let error = engine::run(vec![rank], &job, &mut Forced::new(&[])).unwrap_err();
    assert!(matches!(error, EngineError::Device { .. }), "{error:?}");
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let mut model = TinyModel::new(GROUPED, 1);
    model.final_norm.values[2] = f32::INFINITY;
    let tensor = &model.final_norm;
    let bytes = super::models::little_endian(&tensor.values);
    let view =
        apbd::backend::WeightView { rows: 1, cols: tensor.cols, dtype: apbd::backend::DType::F32, bytes: &bytes };
    assert!(matches!(cpu().weight(view), Err(BackendError::Shape { .. })));
}
