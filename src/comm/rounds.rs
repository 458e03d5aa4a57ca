//! The meeting place of the ranks: one round a collective, numbered alike on every rank.
//!
//! A round whose calls disagree fails on every rank that came or comes to it, with what that rank and a peer asked for; the
//! communicator is then aborted, since the ranks are out of step.
//!
//! Invariant: a round is dropped once every rank has taken it; an abort is never undone; nobody waits longer than the deadline without a rank having come
//! further.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::call::Call;
use crate::comm::CommError;

/// Why a communicator ends whose rank's end was dropped.
const GONE: &str = "the rank went away";

/// What one rank brings to a round.
#[derive(Debug, Clone)]
pub(super) struct Deposit {
    pub call: Call,
    pub rows: Arc<Vec<f32>>,
    pub value: u64,
}

/// All rounds under way.
pub(super) struct Rounds {
    deadline: Duration,
    state: Mutex<State>,
    changed: Condvar,
    /// The communicator has ended, or a rank's end is gone.
    fewer: Condvar,
}

struct State {
    open: BTreeMap<u64, Round>,
    aborted: Option<CommError>,
    /// When a rank has last come further.
    progress: Instant,
    /// Ranks whose end was dropped.
    left: Vec<bool>,
}

struct Round {
    deposits: Vec<Option<Deposit>>,
    taken: usize,
}

impl Round {
    fn new(size: usize) -> Self {
        Self { deposits: vec![None; size], taken: 0 }
    }

    /// The first two ranks found to disagree, the lower first.
    fn disagreement(&self) -> Option<(usize, usize)> {
        let size = self.deposits.len();
        let call = |rank: usize| self.deposits[rank].as_ref().map(|deposit| &deposit.call);
        let mut pairs = (0..size).flat_map(|rank| (rank..size).map(move |peer| (rank, peer)));
        pairs.find(|&(rank, peer)| match (call(rank), call(peer)) {
            (Some(own), Some(other)) => !own.agrees(rank, other, peer),
            _ => false,
        })
    }

    /// The disagreement as `rank` has to report it, if there is one.
    fn mismatch(&self, rank: usize) -> Option<CommError> {
        let (first, second) = self.disagreement()?;
        // What this rank came with against one that does not fit it; for a bystander, the two that do not fit.
        let size = self.deposits.len();
        let own = self.deposits[rank].as_ref()?;
        let opponent = (0..size).find(|&peer| {
            self.deposits[peer].as_ref().is_some_and(|deposit| !own.call.agrees(rank, &deposit.call, peer))
        });
        let (expecting, coming) = match opponent {
            Some(peer) => (rank, peer),
            None => (first, second),
        };
        Some(CommError::Mismatch {
            op: own.call.op(),
            rank,
            expected: self.deposits[expecting].as_ref()?.call.to_string(),
            got: self.deposits[coming].as_ref()?.call.to_string(),
        })
    }
}

impl Rounds {
    pub(super) fn new(size: usize, deadline: Duration) -> Self {
        let (open, progress) = (BTreeMap::new(), Instant::now());
        let state = State { open, aborted: None, progress, left: vec![false; size] };
        Self { deadline, state: Mutex::new(state), changed: Condvar::new(), fewer: Condvar::new() }
    }

    /// Brings `deposit` to a round. Fails if the communicator was aborted, or if the round's calls disagree.
    pub(super) fn deposit(&self, round: u64, rank: usize, deposit: Deposit) -> Result<(), CommError> {
        let mut state = self.lock();
        let size = state.left.len();
        if state.aborted.is_some() && !state.open.contains_key(&round) {
            return state.check_aborted();
        }
        state.progress = Instant::now();
        let opened = state.open.entry(round).or_insert_with(|| Round::new(size));
        opened.deposits[rank] = Some(deposit);
        let mismatch = opened.mismatch(rank);
        self.changed.notify_all();
        match mismatch {
            Some(error) => {
                self.fewer.notify_all();
                Err(state.fail(rank, error))
            }
            None => state.check_aborted(),
        }
    }

    /// Comes to a round from which nobody takes anything: the call is compared with those of the others, whoever comes last.
    pub(super) fn join(&self, round: u64, rank: usize, call: Call) -> Result<(), CommError> {
        self.deposit(round, rank, Deposit { call, rows: Arc::default(), value: 0 })?;
        self.lock().taken_by_one(round);
        Ok(())
    }

    /// A rank has come further: who waits does so for another deadline.
    pub(super) fn come_further(&self) {
        self.lock().progress = Instant::now();
    }

    /// When a rank has last come further.
    pub(super) fn progress(&self) -> Instant {
        self.lock().progress
    }

    /// Why the communicator has ended, if it has or does so within `wait`. A rank that is gone while `rank` waits for it ends it too.
    pub(super) fn ended(&self, rank: usize, wait: Duration) -> Option<CommError> {
        let mut state = self.lock();
        if state.aborted.is_none() && !wait.is_zero() {
            state = self.fewer.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(gone) = state.missed_by(rank) {
            state.abort(gone, GONE);
            self.wake_all();
        }
        state.aborted.clone()
    }

    /// Ends the communicator because of what `rank` has met; `false` if it had ended before.
    #[cfg(feature = "cuda")]
    pub(super) fn fail(&self, rank: usize, error: &CommError) -> bool {
        let mut state = self.lock();
        let is_first = state.aborted.is_none();
        state.abort(rank, &error.to_string());
        self.wake_all();
        is_first
    }

    /// Waits until every rank has come to a round and returns what they brought, by rank.
    pub(super) fn take(&self, round: u64, rank: usize, op: &'static str) -> Result<Vec<Deposit>, CommError> {
        self.take_meanwhile(round, rank, op, Duration::MAX, || {})
    }

    /// As [`Rounds::take`]; `meanwhile` is called every so often while others are waited for, with nothing locked.
    pub(super) fn take_meanwhile(
        &self,
        round: u64,
        rank: usize,
        op: &'static str,
        every: Duration,
        meanwhile: impl Fn(),
    ) -> Result<Vec<Deposit>, CommError> {
        let began = Instant::now();
        let mut called = began;
        let mut state = self.lock();
        loop {
            if let Some(result) = state.poll(round, rank) {
                if result.is_err() {
                    self.wake_all();
                }
                return result;
            }
            let until = began.max(state.progress) + self.deadline;
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                let error = CommError::TimedOut { op, rank, seconds: self.deadline.as_secs() };
                self.wake_all();
                return Err(state.fail(rank, error));
            };
            state = self.changed.wait_timeout(state, left.min(every)).unwrap_or_else(PoisonError::into_inner).0;
            if called.elapsed() >= every {
                drop(state);
                meanwhile();
                called = Instant::now();
                state = self.lock();
            }
        }
    }

    /// Ends the communicator. The first reason is kept.
    pub(super) fn abort(&self, rank: usize, reason: &str) {
        self.lock().abort(rank, reason);
        self.wake_all();
    }

    /// Notes that a rank's end is gone: whoever waits for it is woken.
    pub(super) fn leave(&self, rank: usize) {
        self.lock().left[rank] = true;
        self.wake_all();
    }

    fn wake_all(&self) {
        self.changed.notify_all();
        self.fewer.notify_all();
    }

    /// A rank that panicked while holding the lock left the state whole: nothing in here calls foreign code.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn abort(&mut self, rank: usize, reason: &str) {
        self.aborted.get_or_insert_with(|| CommError::Aborted { rank, reason: reason.to_owned() });
    }

    fn check_aborted(&self) -> Result<(), CommError> {
        self.aborted.clone().map_or(Ok(()), Err)
    }

    /// Aborts because of `error`, which is handed back for the rank that met it.
    fn fail(&mut self, rank: usize, error: CommError) -> CommError {
        self.abort(rank, &error.to_string());
        error
    }

    /// How a round stands for `rank`: nothing while it has to wait.
    fn poll(&mut self, round: u64, rank: usize) -> Option<Result<Vec<Deposit>, CommError>> {
        let size = self.left.len();
        let Some(open) = self.open.get_mut(&round) else { return self.aborted.clone().map(Err) };
        // A disagreement goes before the abort that it brings about, so that every rank reports what it saw itself.
        if let Some(error) = open.mismatch(rank) {
            return Some(Err(self.fail(rank, error)));
        }
        if let Some(error) = &self.aborted {
            return Some(Err(error.clone()));
        }
        if open.deposits.iter().all(Option::is_some) {
            let deposits = open.deposits.iter().flatten().cloned().collect();
            self.taken_by_one(round);
            return Some(Ok(deposits));
        }
        let gone = (0..size).find(|&peer| open.deposits[peer].is_none() && self.left[peer])?;
        self.abort(gone, GONE);
        self.aborted.clone().map(Err)
    }

    /// One rank needs the round no more; without any that does it is dropped.
    fn taken_by_one(&mut self, round: u64) {
        let size = self.left.len();
        if let Some(open) = self.open.get_mut(&round) {
            open.taken += 1;
            if open.taken == size {
                self.open.remove(&round);
            }
        }
    }

    /// A rank that is gone and has not come to a round that `rank` has come to.
    fn missed_by(&self, rank: usize) -> Option<usize> {
        let waits = self.open.values().filter(|round| round.deposits[rank].is_some());
        waits
            .flat_map(|round| (0..self.left.len()).filter(|&peer| round.deposits[peer].is_none() && self.left[peer]))
            .next()
    }
}
