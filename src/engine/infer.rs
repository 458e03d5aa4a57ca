//! One inference on one rank: prefill, query, generation.
//!
//! Invariant: every rank leaves at the same place, whether it ends, is cancelled, or the root can not choose a token.

use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::comm::Comm;
use crate::generate::generator::Step;
use crate::plan::PrefillPlan;

use super::control::{Control, Driver};
use super::decode::Decoder;
use super::prefill::prefill;
use super::rank::{Rank, RankError};

/// What all ranks work on together.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Tokens of the context; as many as the plan is for.
    pub context: &'a [u32],
    /// Tokens of the query.
    pub query: &'a [u32],
    /// How the context is cut.
    pub plan: &'a PrefillPlan,
    /// Generated tokens at most; what the last host's cache has room for.
    pub new_tokens: usize,
}

/// How long it took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// Context through all layers, on all ranks.
    pub prefill: Duration,
    /// Query and generated tokens.
    pub generate: Duration,
}

/// Runs a job on one rank; `driver` is given on the root.
pub(super) fn infer<B: Backend, C: Comm<B::Matrix, B::Scores>>(
    rank: &Rank<'_, B, C>,
    job: &Job<'_>,
    driver: Option<&mut dyn Driver>,
) -> Result<Timing, RankError> {
    let mut control = Control::new(driver, job.new_tokens);
    let start = Instant::now();
    let cache = prefill(rank, job, &mut control)?;
    rank.backend.synchronize()?;
    rank.comm.barrier()?;
    let prefilled = Instant::now();
    let mut decoder = Decoder::new(rank, job.plan, cache)?;
    decoder.append(job.query)?;
    while let Step::Continue(token) = control.next(rank, &decoder)? {
        decoder.append(&[token])?;
    }
    rank.backend.synchronize()?;
    Ok(Timing { prefill: prefilled - start, generate: prefilled.elapsed() })
}
