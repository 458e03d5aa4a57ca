//! Runs of the engine on the CPU, with tokens forced and logits recorded.

use std::time::Duration;

use apbd::backend::cpu::{Cpu, Matrix, Scores};
use apbd::comm::Comm;
use apbd::comm::local::LocalComm;
use apbd::engine::{self, Driver, EngineError, Job, Progress, Rank, Timing};
use apbd::generate::generator::Step;
use apbd::plan::{AttentionRequest, Capabilities, PrefillPlan};

use super::models::{TinyModel, cpu};
use super::oracle::Case;

/// Far longer than any test: a rank that waits so long hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Feeds given tokens and keeps the logits before each.
pub struct Forced<'a> {
    left: &'a [u32],
    pub logits: Vec<Vec<f32>>,
    /// Reports of progress, in order.
    pub reports: Vec<Progress>,
    /// Cancels at this report.
    pub cancel_at: Option<usize>,
}

impl<'a> Forced<'a> {
    pub fn new(tokens: &'a [u32]) -> Self {
        Self { left: tokens, logits: Vec::new(), reports: Vec::new(), cancel_at: None }
    }
}

impl Driver for Forced<'_> {
    fn progress(&mut self, progress: Progress) -> bool {
        self.reports.push(progress);
        self.cancel_at != Some(self.reports.len() - 1)
    }

    fn next(&mut self, logits: &mut [f32]) -> Result<Step, EngineError> {
        self.logits.push(logits.to_vec());
        let Some((token, left)) = self.left.split_first() else { return Ok(Step::Stop) };
        self.left = left;
        Ok(Step::Continue(*token))
    }
}

/// The plan of a case.
pub fn plan(case: &Case, context: usize, query: usize) -> PrefillPlan {
    let star = case.mode == apbd::plan::AttentionMode::Star;
    let request = AttentionRequest {
        mode: Some(case.mode),
        hosts: Some(case.hosts),
        anchor: (!star).then_some(case.anchor),
        passing: Some(case.passing),
        selector: Some(case.selector),
        query_in_anchor: Some(case.query_in_anchor),
        kv_budget: case.kv_budget,
        execution: case.execution,
    };
    let capabilities = Capabilities { has_retaining_heads: true, max_hosts: 64 };
    PrefillPlan::new(context, query, case.query_at, &request, capabilities).unwrap()
}

/// Logits after the query and after each forced token, with so many ranks.
pub fn logits(
    model: &TinyModel,
    context: &[u32],
    query: &[u32],
    forced: &[u32],
    case: &Case,
    ranks: usize,
) -> Vec<Vec<f32>> {
    let plan = plan(case, context.len(), query.len());
    let job = Job { context, query, plan: &plan, new_tokens: forced.len() };
    let mut driver = Forced::new(forced);
    run(model, &job, ranks, &mut driver).unwrap();
    driver.logits
}

/// Runs a job on so many ranks, idle ones included.
pub fn run(model: &TinyModel, job: &Job<'_>, ranks: usize, driver: &mut dyn Driver) -> Result<Timing, EngineError> {
    run_over(model, job, LocalComm::group(ranks, DEADLINE), driver)
}

/// Runs a job on ranks that are connected by these.
pub fn run_over<C: Comm<Matrix, Scores>>(
    model: &TinyModel,
    job: &Job<'_>,
    ends: Vec<C>,
    driver: &mut dyn Driver,
) -> Result<Timing, EngineError> {
    let backends: Vec<Cpu> = ends.iter().map(|_| cpu()).collect();
    let weights = model.weights(&backends[0]);
    let rank = |(backend, comm)| Rank { backend, comm, weights: &weights, spec: &model.spec };
    let ranks = backends.iter().zip(ends).map(rank).collect();
    engine::run(ranks, job, driver)
}
