//! Communicators that dawdle, and that give up at a chosen call: no rank hangs, all of them end with an error, and new ranks do better.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use apbd::backend::cpu::{Matrix, Scores};
use apbd::comm::local::LocalComm;
use apbd::comm::{Comm, CommError, Partials};
use apbd::engine::{EngineError, Job, Timing};
use apbd::plan::{AttentionMode, Execution, Selector};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::models::{GROUPED, TinyModel, distinct_tokens};
use super::oracle::Case;
use super::runs::{self, DEADLINE, Forced};
use super::strategies::EXECUTIONS;

/// What a rank calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    AllGather,
    AllGatherPartials,
    AllToAll,
    Finish,
    FinishAllToAll,
    Broadcast,
    Barrier,
}

/// What a rank does instead of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Aborts, and goes on as if nothing had happened.
    Abort,
    /// Fails by itself.
    Fail,
    /// Panics.
    Panic,
    /// Comes [`LATE`] and then does as it should.
    Late,
}

const LATE: Duration = Duration::from_millis(300);

/// At which call of which kind.
type At = (Kind, usize, Fault);

/// One rank's end that dawdles before every call.
struct Unruly {
    inner: LocalComm,
    delays: Mutex<StdRng>,
    layer_takes: Duration,
    fault: Option<At>,
    calls: Arc<Mutex<BTreeMap<Kind, usize>>>,
    /// Whether a call has failed here.
    failed: Arc<AtomicBool>,
}

impl Unruly {
    /// What happens before a call.
    fn meet(&self, kind: Kind) -> Result<(), CommError> {
        let pause = self.delays.lock().unwrap().random_range(0..400);
        // Most calls come at once, a few late.
        if pause < 100 {
            std::thread::sleep(Duration::from_micros(pause));
        }
        let mut calls = self.calls.lock().unwrap();
        let call = calls.entry(kind).or_default();
        *call += 1;
        match self.fault {
            Some((of, at, fault)) if (of, at) == (kind, *call - 1) => {
                drop(calls);
                self.strike(fault)
            }
            _ => Ok(()),
        }
    }

    fn strike(&self, fault: Fault) -> Result<(), CommError> {
        match fault {
            Fault::Abort => {
                Comm::<Matrix, Scores>::abort(&self.inner, "struck");
                Ok(())
            }
            Fault::Fail => Err(CommError::Device { op: "struck", reason: "struck".to_owned() }),
            Fault::Panic => {
                self.failed.store(true, Ordering::SeqCst);
                panic!("struck")
            }
            Fault::Late => {
                std::thread::sleep(LATE);
                Ok(())
            }
        }
    }

    fn call<T>(&self, kind: Kind, work: impl FnOnce(&LocalComm) -> Result<T, CommError>) -> Result<T, CommError> {
        self.heard(self.meet(kind).and_then(|()| work(&self.inner)))
    }

    /// Notes that this rank has heard of a failure, if it has.
    fn heard<T>(&self, outcome: Result<T, CommError>) -> Result<T, CommError> {
        if outcome.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        outcome
    }
}

impl Comm<Matrix, Scores> for Unruly {
    type Pending<const N: usize> = <LocalComm as Comm<Matrix, Scores>>::Pending<N>;
    type Exchange<const N: usize> = <LocalComm as Comm<Matrix, Scores>>::Exchange<N>;

    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn all_gather<const N: usize>(&self, rows: [Matrix; N], counts: &[usize]) -> Result<Self::Pending<N>, CommError> {
        self.call(Kind::AllGather, |inner| inner.all_gather(rows, counts))
    }
    fn all_to_all<const N: usize>(
        &self,
        send: [Matrix; N],
        send_counts: &[usize],
        receive: [Matrix; N],
        receive_counts: &[usize],
    ) -> Result<Self::Exchange<N>, CommError> {
        self.call(Kind::AllToAll, |inner| inner.all_to_all(send, send_counts, receive, receive_counts))
    }
    fn finish_all_to_all<const N: usize>(
        &self,
        exchange: Self::Exchange<N>,
    ) -> Result<([Matrix; N], [Matrix; N]), CommError> {
        self.call(Kind::FinishAllToAll, |inner| inner.finish_all_to_all(exchange))
    }
    fn finish<const N: usize>(&self, pending: Self::Pending<N>) -> Result<[Matrix; N], CommError> {
        self.call(Kind::Finish, |inner| inner.finish(pending))
    }
    fn all_gather_partials(&self, partials: Partials<'_, Matrix, Scores>, counts: &[usize]) -> Result<(), CommError> {
        self.call(Kind::AllGatherPartials, |inner| inner.all_gather_partials(partials, counts))
    }
    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        self.call(Kind::Broadcast, |inner| Comm::<Matrix, Scores>::broadcast(inner, root, value))
    }
    fn barrier(&self) -> Result<(), CommError> {
        self.call(Kind::Barrier, Comm::<Matrix, Scores>::barrier)
    }
    fn come_further(&self) {
        std::thread::sleep(self.layer_takes);
        Comm::<Matrix, Scores>::come_further(&self.inner);
    }
    fn check(&self) -> Result<(), CommError> {
        self.heard(Comm::<Matrix, Scores>::check(&self.inner))
    }
    fn abort(&self, reason: &str) {
        Comm::<Matrix, Scores>::abort(&self.inner, reason);
    }
}

const RANKS: usize = 3;

/// A run on three ranks.
struct Trial {
    model: TinyModel,
    tokens: Vec<u32>,
    case: Case,
}

/// What came of it.
struct Ended {
    outcome: Result<Vec<Vec<f32>>, EngineError>,
    timing: Timing,
    /// Calls of each rank by kind.
    calls: Vec<BTreeMap<Kind, usize>>,
    failed: Vec<bool>,
}

impl Trial {
    fn new(mode: AttentionMode, selector: Selector, execution: Execution) -> Self {
        let case = Case {
            mode,
            hosts: 6,
            anchor: 12,
            passing: 3,
            query_at: 2,
            query_in_anchor: true,
            selector,
            kv_budget: None,
            execution,
        };
        Self { model: TinyModel::new(GROUPED, 1), tokens: distinct_tokens(67, 1), case }
    }

    fn run(&self, seed: u64, fault: Option<(usize, At)>) -> Ended {
        self.run_slowly(seed, fault, DEADLINE, [Duration::ZERO; RANKS])
    }

    /// As [`run`](Self::run), with a layer taking each rank so much longer.
    fn run_slowly(
        &self,
        seed: u64,
        fault: Option<(usize, At)>,
        deadline: Duration,
        layer_takes: [Duration; RANKS],
    ) -> Ended {
        let (context, query) = self.tokens.split_at(60);
        let plan = runs::plan(&self.case, context.len(), query.len());
        let job = Job { context, query, plan: &plan, new_tokens: 2 };
        let calls: Vec<Arc<Mutex<BTreeMap<Kind, usize>>>> = (0..RANKS).map(|_| Arc::default()).collect();
        let failed: Vec<Arc<AtomicBool>> = (0..RANKS).map(|_| Arc::default()).collect();
        let end = |(rank, inner): (usize, LocalComm)| Unruly {
            inner,
            delays: Mutex::new(StdRng::seed_from_u64(100 * seed + rank as u64)),
            layer_takes: layer_takes[rank],
            fault: fault.filter(|(culprit, _)| *culprit == rank).map(|(_, at)| at),
            calls: calls[rank].clone(),
            failed: failed[rank].clone(),
        };
        let ends = LocalComm::group(RANKS, deadline).into_iter().enumerate().map(end).collect();
        let mut driver = Forced::new(&[5, 6]);
        let timing = runs::run_over(&self.model, &job, ends, &mut driver);
        Ended {
            timing: timing.as_ref().copied().unwrap_or_default(),
            outcome: timing.map(|_| driver.logits),
            calls: calls.iter().map(|calls| calls.lock().unwrap().clone()).collect(),
            failed: failed.iter().map(|failed| failed.load(Ordering::SeqCst)).collect(),
        }
    }
}

/// Every strategy once, with all that a communicator can do among them.
fn trials() -> Vec<Trial> {
    let apb = |execution| Trial::new(AttentionMode::Apb, Selector::RetainingHead, execution);
    let mut trials: Vec<Trial> = EXECUTIONS.iter().map(|execution| apb(*execution)).collect();
    for mode in [AttentionMode::Ring, AttentionMode::Ulysses, AttentionMode::Star] {
        trials.push(Trial::new(mode, Selector::None, EXECUTIONS[2]));
    }
    trials.push(Trial::new(AttentionMode::Ring, Selector::None, EXECUTIONS[1]));
    trials
}

#[test]
fn delays_change_nothing() {
    for trial in trials() {
        let quiet = trial.run(0, None);
        let logits = quiet.outcome.unwrap();
        for seed in 1..4 {
            let ended = trial.run(seed, None);
            assert_eq!(ended.outcome.unwrap(), logits, "{:?}", trial.case);
            assert_eq!((ended.calls, ended.failed), (quiet.calls.clone(), vec![false; RANKS]));
        }
    }
}

#[test]
fn a_prefill_takes_until_the_last_rank_is_through() {
    // Star passes nothing on: its ranks meet for the first time when the query has to see what each of them keeps.
    let star = Trial::new(AttentionMode::Star, Selector::None, Execution::default());
    for rank in 0..RANKS {
        let ended = star.run(0, Some((rank, (Kind::AllGatherPartials, 0, Fault::Late))));
        assert!(ended.outcome.is_ok() && ended.timing.prefill >= LATE, "rank {rank}: {:?}", ended.timing);
    }
}

#[test]
fn a_rank_may_take_longer_than_the_deadline_for_a_context_but_not_for_a_layer() {
    let star = Trial::new(AttentionMode::Star, Selector::None, Execution::default());
    let (logits, deadline) = (star.run(0, None).outcome.unwrap(), 2 * LATE);
    for rank in 0..RANKS {
        let only = |takes: Duration| {
            let mut layer_takes = [Duration::ZERO; RANKS];
            layer_takes[rank] = takes;
            star.run_slowly(0, None, deadline, layer_takes)
        };
        let ended = only(LATE);
        assert!(ended.timing.prefill > deadline, "rank {rank}: {:?}", ended.timing);
        assert_eq!(ended.outcome.unwrap(), logits, "rank {rank}");
        // For the root the others wait outside of collectives: it tells them what comes next.
        let stuck = only(2 * deadline).outcome.map(drop);
        let is_told = matches!(&stuck, Err(EngineError::Device { reason }) if reason.contains("came further"));
        assert_eq!(is_told, rank > 0, "rank {rank}: {stuck:?}");
    }
}

#[test]
fn an_abort_in_any_collective_ends_every_rank_and_a_new_group_works() {
    let mut kinds_struck = BTreeMap::new();
    for (index, trial) in trials().into_iter().enumerate() {
        let whole = trial.run(0, None);
        let logits = whole.outcome.unwrap();
        for (culprit, calls) in whole.calls.iter().enumerate() {
            for (&kind, &count) in calls {
                // The first, the last, and some between that differ from trial to trial.
                let places = [0, count - 1, (1 + index) % count, (5 + 3 * index + culprit) % count];
                for (place, fault) in places.into_iter().zip([Fault::Abort, Fault::Fail, Fault::Panic, Fault::Abort]) {
                    let ended = trial.run(place as u64, Some((culprit, (kind, place, fault))));
                    let said = format!("{:?}: {fault:?} on rank {culprit} in {kind:?} {place} of {count}", trial.case);
                    check_struck(&ended, &said);
                    *kinds_struck.entry(kind).or_insert(0) += 1;
                }
            }
        }
        assert_eq!(trial.run(9, None).outcome.unwrap(), logits, "{:?}", trial.case);
    }
    assert_eq!(kinds_struck.len(), 6, "{kinds_struck:?}");
}

fn check_struck(ended: &Ended, said: &str) {
    let Err(EngineError::Device { reason }) = &ended.outcome else { panic!("{said}: {:?}", ended.outcome) };
    assert!(reason.contains("struck"), "{said}: {reason}");
    assert_eq!(ended.failed, [true; RANKS], "{said}: a rank has not noticed");
}
