//! Several engines with the same model, each on devices of its own, as one engine: every document goes to the smallest of them that it fits into
//! and that has time for it.
//!
//! Invariant: a document is in one group at a time; one that came back undone because its engine ended goes where the policy says, as if it had
//! just come. While one group has an engine, the pool has one.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::engine::{EngineOptions, SupervisedEngine};
use super::speeds::Speeds;
use super::state::Outlook;
use crate::cost::{Learned, Observation, Place};
use crate::engine::{Engine, EngineError, EngineInfo, InferOutcome, InferRequest, Observer, Progress};
use crate::plan::route::{GroupShape, Offer, Router, Ticket};
use crate::plan::{AttentionRequest, PrefillPlan};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// How often who waits looks whether a group has changed, and whether its caller still wants it.
const TICK: Duration = Duration::from_millis(100);
/// Documents a group that wait for groups larger than it. More would take the places of those that it could do meanwhile.
const WAITING: usize = 1;
/// When a document comes again that the pool has no place for: when the group should be free, but never sooner and never later than this. Coming too
/// often would fill the table of attempts.
const COMES_AGAIN_S: (f64, f64) = (5.0, 900.0);
/// How often a document may come back undone before it is handed back to where it came from.
const TRIES: usize = 8;

/// One group of devices and its engine.
#[derive(Debug, Clone)]
pub struct PoolGroup {
    /// Devices that work on a document together: what makes one group smaller than another.
    pub ranks: usize,
    /// How its engine is run; the name is the group's.
    pub options: EngineOptions,
}

/// Groups, and who is in which.
pub struct Pool {
    groups: Vec<Member>,
    info: EngineInfo,
    state: Mutex<State>,
    /// Told what every inference took.
    observed: Box<dyn Fn(Observation) + Send + Sync>,
    /// Somebody was placed, or may be now.
    changed: Condvar,
}

struct Member {
    name: String,
    engine: SupervisedEngine,
}

struct State {
    router: Router,
    speeds: Speeds,
    tickets: Ticket,
}

/// What a group has answered to a document.
enum Answer {
    /// It was not asked, or could not answer.
    Unknown,
    /// It would run it so.
    Fits(PrefillPlan),
    /// The document needs more memory than it has.
    TooSmall(EngineError),
}

impl Pool {
    /// Starts all engines at once, and waits for their models, which have to be the same. `observed` is told what every inference took; it must
    /// not block.
    pub fn start(
        mut groups: Vec<(PoolGroup, Component)>,
        observed: impl Fn(Observation) + Send + Sync + 'static,
    ) -> Result<Self, String> {
        groups.sort_by_key(|(group, _)| group.ranks);
        let culprits = Arc::default();
        let ranks: Vec<usize> = groups.iter().map(|(group, _)| group.ranks).collect();
        let start = |(group, health): (PoolGroup, Component)| {
            let (name, culprits) = (group.options.group.clone(), Arc::clone(&culprits));
            let engine = SupervisedEngine::start(group.options, health, culprits);
            engine
                .map(|engine| Member { name: name.clone(), engine })
                .map_err(|reason| format!("group {name}: {reason}"))
        };
        let started: Vec<Result<Member, String>> = thread::scope(|scope| {
            let starts: Vec<_> = groups.into_iter().map(|group| scope.spawn(|| start(group))).collect();
            let panicked = |_| Err("the start of a group panicked; its message is in the log".to_owned());
            starts.into_iter().map(|started| started.join().unwrap_or_else(panicked)).collect()
        });
        let groups = started.into_iter().collect::<Result<Vec<_>, _>>()?;
        let info = whole(&groups)?;
        let shape = |(member, ranks): (&Member, &usize)| GroupShape {
            ranks: *ranks,
            slots: member.engine.info().concurrency.max(1),
            memory_bytes: u64::MAX,
        };
        let router = Router::new(groups.iter().zip(&ranks).map(shape));
        let infos: Vec<EngineInfo> = groups.iter().map(|member| member.engine.info()).collect();
        let speeds = Speeds::new(ranks.into_iter().zip(&infos));
        let state = Mutex::new(State { router, speeds, tickets: 0 });
        Ok(Self { groups, info, state, observed: Box::new(observed), changed: Condvar::new() })
    }

    /// Takes over what was learned about groups before.
    pub fn learn(&self, known: &[(Place, Learned)]) {
        self.state().speeds.learn(known);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places who can be placed, and wakes them.
    fn assign(&self, state: &mut State) {
        for (index, member) in self.groups.iter().enumerate() {
            state.router.set_open(index, member.engine.room() > 0);
        }
        let mut is_any = false;
        while state.router.place_next().is_some() {
            is_any = true;
        }
        if is_any {
            self.changed.notify_all();
        }
        metrics::POOL_WAITING.set(&[], state.router.waiting() as u64);
        for (index, member) in self.groups.iter().enumerate() {
            let load = state.router.load(index);
            metrics::GROUP_DOCUMENTS.set(&[&member.name], load.documents as u64);
            metrics::GROUP_BACKLOG.set(&[&member.name], load.backlog_s.ceil() as u64);
        }
    }

    /// Why nobody can be served soon, if that is so for all of these groups.
    fn none_of(&self, mut groups: impl Iterator<Item = usize>) -> Option<String> {
        let first = groups.next()?;
        let down = |group: usize| match self.groups[group].engine.outlook() {
            Outlook::Down(reason) => Some(reason),
            Outlook::Ready | Outlook::Coming => None,
        };
        let reason = down(first)?;
        groups.all(|group| down(group).is_some()).then_some(reason)
    }
}

/// What all groups together are.
fn whole(groups: &[Member]) -> Result<EngineInfo, String> {
    let infos: Vec<EngineInfo> = groups.iter().map(|member| member.engine.info()).collect();
    let Some((first, others)) = infos.split_first() else { return Err("the pool has no group".to_owned()) };
    for (info, member) in others.iter().zip(&groups[1..]) {
        if info.model_digest != first.model_digest {
            return Err(format!(
                "group {} has another model than group {}: {} is {}, {} is {}; all groups of a pool serve the same",
                member.name, groups[0].name, info.model, info.model_digest, first.model, first.model_digest
            ));
        }
    }
    let mut devices: Vec<&str> = infos.iter().map(|info| info.device.as_str()).collect();
    devices.dedup();
    // Of several groups each has one that waits for it, and one that waits for larger ones takes no place of theirs.
    let ahead = if infos.len() > 1 { (1 + WAITING) * infos.len() } else { 0 };
    Ok(EngineInfo {
        max_tokens: infos.iter().map(|info| info.max_tokens).max().unwrap_or(0),
        concurrency: infos.iter().map(|info| info.concurrency.max(1)).sum::<usize>() + ahead,
        device: devices.join(" + "),
        ..first.clone()
    })
}

/// A document's place in the pool, from its coming to its end.
struct Seat<'a> {
    pool: &'a Pool,
    ticket: Ticket,
    request: &'a InferRequest,
    /// By group.
    answers: Vec<Answer>,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        state.router.leave(self.ticket);
        self.pool.assign(&mut state);
    }
}

impl<'a> Seat<'a> {
    fn take(pool: &'a Pool, request: &'a InferRequest) -> Self {
        let mut state = pool.state();
        state.tickets += 1;
        let ticket = state.tickets;
        state.router.arrive(ticket);
        let answers = pool.groups.iter().map(|_| Answer::Unknown).collect();
        Self { pool, ticket, request, answers }
    }

    /// Waits until a group takes the document.
    fn group(&mut self, observer: Observer<'_>) -> Result<usize, EngineError> {
        let mut has_waited = false;
        loop {
            self.ask()?;
            {
                let mut state = self.pool.state();
                self.pool.assign(&mut state);
                if let Some(group) = state.router.place(self.ticket) {
                    return Ok(group);
                }
                self.refusal()?;
                if !std::mem::replace(&mut has_waited, true) {
                    self.crowd(&state.router)?;
                }
                drop(self.pool.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner));
            }
            if !observer(Progress::Waiting) {
                return Err(EngineError::Cancelled);
            }
        }
    }

    /// Asks every group that was not asked yet and that has an engine.
    fn ask(&mut self) -> Result<(), EngineError> {
        for (index, member) in self.pool.groups.iter().enumerate() {
            if !matches!(self.answers[index], Answer::Unknown) || !member.engine.is_ready() {
                continue;
            }
            let (plan, demand) = match member.engine.offer(self.request) {
                Ok(offer) => offer,
                Err(error @ EngineError::Memory { .. }) => {
                    self.answers[index] = Answer::TooSmall(error);
                    continue;
                }
                Err(error @ (EngineError::Input { .. } | EngineError::Schema { .. })) => return Err(error),
                // It is asked again when it has an engine.
                Err(_) => continue,
            };
            if let Some(demand) = demand.filter(|demand| demand.needed_bytes() > demand.available_bytes) {
                self.answers[index] = Answer::TooSmall(EngineError::Memory {
                    tokens: self.request.context.len(),
                    needed_bytes: demand.needed_bytes(),
                    available_bytes: demand.available_bytes,
                });
                continue;
            }
            let mut state = self.pool.state();
            let seconds = state.speeds.seconds(index, &plan);
            if let Some(demand) = demand {
                state.router.set_shape(index, |shape| shape.memory_bytes = demand.available_bytes);
            }
            let (kept_bytes, transient_bytes) =
                demand.map_or((0, 0), |demand| (demand.kept_bytes, demand.transient_bytes));
            state.router.offer(self.ticket, index, Offer { seconds, kept_bytes, transient_bytes });
            self.answers[index] = Answer::Fits(plan);
        }
        Ok(())
    }

    /// Why no group will take it, however long it waits.
    fn refusal(&self) -> Result<(), EngineError> {
        let may_fit = || {
            let fits = |(_, answer): &(usize, &Answer)| !matches!(answer, Answer::TooSmall(_));
            self.answers.iter().enumerate().filter(fits).map(|(index, _)| index)
        };
        if may_fit().next().is_none() {
            let available = |error: &EngineError| match error {
                EngineError::Memory { available_bytes, .. } => *available_bytes,
                _ => 0,
            };
            let refusals = self.answers.iter().filter_map(|answer| match answer {
                Answer::TooSmall(error) => Some(error),
                Answer::Unknown | Answer::Fits(_) => None,
            });
            return refusals.max_by_key(|error| available(error)).map_or(Ok(()), |error| Err(error.clone()));
        }
        match self.pool.none_of(may_fit()) {
            Some(reason) => Err(EngineError::Unavailable { reason }),
            None => Ok(()),
        }
    }

    /// A document that some groups are too small for does not wait where enough of its kind do: it would take the place of one that they could do.
    fn crowd(&self, router: &Router) -> Result<(), EngineError> {
        let at_most = WAITING * self.pool.groups.len();
        let too_small = |group: &usize| matches!(self.answers[*group], Answer::TooSmall(_));
        let groups = 0..self.answers.len();
        // It is one of those that wait itself.
        if !groups.clone().filter(too_small).any(|group| router.waiting_for_others(group) > at_most) {
            return Ok(());
        }
        let fitting = groups.filter(|group| matches!(self.answers[*group], Answer::Fits(_)));
        let wait_s = fitting.map(|group| router.load(group).backlog_s).fold(f64::INFINITY, f64::min);
        Err(EngineError::Busy { seconds: wait_s.clamp(COMES_AGAIN_S.0, COMES_AGAIN_S.1) as u64 })
    }

    fn run(&self, group: usize, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let stage = AtomicU8::new(0);
        let member = &self.pool.groups[group];
        let outcome = member.engine.infer(self.request, &|progress| {
            self.progressed(progress, &stage);
            observer(progress)
        })?;
        if let Answer::Fits(plan) = &self.answers[group] {
            let seen = self.pool.state().speeds.observe(group, plan, &outcome);
            seen.into_iter().for_each(|observation| (self.pool.observed)(observation));
            let rate = plan.context as f64 / outcome.prefill.as_secs_f64().max(1e-6);
            metrics::GROUP_RATE.set(&[&member.name], rate as u64);
        }
        Ok(outcome)
    }

    /// Tells the policy how far the prefill is; where it begins or ends, another document may come in.
    fn progressed(&self, progress: Progress, last: &AtomicU8) {
        let (stage, part) = match progress {
            Progress::Waiting | Progress::Prefill { layers: 0, .. } => return,
            Progress::Prefill { layers_done, layers } => (1, layers_done as f64 / layers as f64),
            Progress::Generate { .. } => (2, 1.0),
        };
        let before = last.swap(stage, Ordering::Relaxed);
        // Of tokens there are many, and they change nothing.
        if (before, stage) == (2, 2) {
            return;
        }
        let mut state = self.pool.state();
        state.router.prefilled(self.ticket, part);
        if before != stage {
            self.pool.assign(&mut state);
        }
    }

    /// The group has not done it: it waits again.
    fn come_back(&self) {
        let mut state = self.pool.state();
        state.router.take_back(self.ticket);
        self.pool.assign(&mut state);
    }
}

impl Engine for Pool {
    fn info(&self) -> EngineInfo {
        self.info.clone()
    }

    fn is_ready(&self) -> bool {
        self.groups.iter().any(|member| member.engine.is_ready())
    }

    /// That of the smallest group that it fits into.
    fn plan(
        &self,
        context: usize,
        query: usize,
        query_at: usize,
        attention: &AttentionRequest,
    ) -> Result<PrefillPlan, EngineError> {
        let mut last = EngineError::Unavailable { reason: "the pool has no group".to_owned() };
        for member in &self.groups {
            match member.engine.plan(context, query, query_at, attention) {
                Err(error @ (EngineError::Memory { .. } | EngineError::Unavailable { .. })) => last = error,
                answered => return answered,
            }
        }
        Err(last)
    }

    fn infer(&self, request: &InferRequest, observer: Observer<'_>) -> Result<InferOutcome, EngineError> {
        let mut seat = Seat::take(self, request);
        let mut tries = 0;
        loop {
            let group = seat.group(observer)?;
            tries += 1;
            match seat.run(group, observer) {
                Err(EngineError::Unavailable { .. }) if tries < TRIES => seat.come_back(),
                ended => return ended,
            }
        }
    }
}
