//! The ranks of a group as threads: started, named, joined; a failure of one ends all.
//!
//! Invariant: no thread outlives the call; a rank that fails or panics aborts the communicator, so that no other waits for it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, ScopedJoinHandle, scope};
use std::time::Duration;

use crate::backend::{Backend, BackendError};
use crate::comm::hub::{Heard, Orders, Side, Told};
use crate::comm::{Comm, CommError};
use crate::plan::{PrefillPlan, QUERY_CHUNK};

use super::EngineError;
use super::command::{Command, Job};
use super::conversation::{self, Driver, Outcome, Timing};
use super::lead::{Leader, Submission};
use super::member::Member;
use super::rank::{ROOT, Rank, RankError};
use super::schedule::{Limits, Needs, Schedule};

/// What a group is given beside its ranks.
pub(super) struct Work<'a> {
    /// What callers submit; the group ends when nobody can submit any more.
    pub inbox: Receiver<Submission>,
    /// How much at a time.
    pub limits: Limits,
    /// Bytes that all sequences may take together, given those that are taken.
    pub budget: &'a (dyn Fn(u64) -> u64 + Sync),
    /// The other nodes of a group, which are told what to do; kept until all ranks have ended.
    pub side: Option<Side>,
}

/// What another node than the first is asked, and says, beside what the first decides.
pub struct Following<'a> {
    /// Called once, when all nodes have come.
    pub joined: &'a dyn Fn(),
    /// Set when this node is to leave: it does so between two documents.
    pub leaves: &'a AtomicBool,
}

/// What the first node is told of one that leaves.
const LEAVES: &str = "its node was told to stop";

/// Runs a group on the ranks of this process, the root among them, which are given in order. Blocks until every one of them has ended.
pub(super) fn serve<B, C>(ranks: Vec<Rank<'_, B, C>>, mut work: Work<'_>) -> Result<(), EngineError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    let (mut orders, mut followers) = (Vec::new(), Vec::new());
    for _ in 1..ranks.len() {
        let (sender, receiver) = channel();
        followers.push(sender);
        orders.push(Some(receiver));
    }
    let (at_once, never) = (work.limits.at_once, AtomicBool::new(false));
    // Kept until the last of the ranks has ended: the others meet at it.
    let mut side = work.side.take();
    let nodes = match &mut side {
        Some(Side::First(hub)) => hub.take_orders(),
        _ => Vec::new(),
    };
    let outcomes = scope(|scope| {
        let mut threads = Vec::with_capacity(ranks.len() + nodes.len());
        for node in nodes {
            let (sender, commands) = channel();
            followers.push(sender);
            let builder = Builder::new().name(format!("apbd-node-{}", node.node()));
            threads.push(builder.spawn_scoped(scope, move || pass_on(&node, &commands)));
        }
        let mut work = Some((work, followers));
        for rank in ranks {
            let index = rank.comm.rank();
            let builder = Builder::new().name(format!("apbd-rank-{index}"));
            // A rank that could not be started is dropped with its end of the communicator, which ends the others.
            threads.push(match (index == ROOT).then(|| work.take()).flatten() {
                Some((work, followers)) => builder.spawn_scoped(scope, move || lead(&rank, work, followers)),
                None => {
                    let orders = orders.get_mut(index.wrapping_sub(1)).and_then(Option::take);
                    let never = &never;
                    builder.spawn_scoped(scope, move || follow(&rank, orders, at_once, never))
                }
            });
        }
        // Without a root nobody commands: the followers' orders end.
        drop(work.take());
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    settle(outcomes)
}

/// Sends a node every command as it comes. What it does not get it can not obey, and the communicator says so.
fn pass_on(node: &Orders, commands: &Receiver<Arc<Command>>) -> Result<(), RankError> {
    for command in commands {
        let order = serde_json::to_value(&*command);
        let order = order.map_err(|error| CommError::Device { op: "order", reason: error.to_string() })?;
        if !node.send(order) {
            break;
        }
    }
    Ok(())
}

/// Runs the ranks of another node than the first, which are given in order, on what the first decides. Blocks until that has no more to do, or until
/// there is no document in them and this node `leaves`.
pub(super) fn follow_first_node<B, C>(
    ranks: Vec<Rank<'_, B, C>>,
    mut told: Told,
    at_once: usize,
    leaves: &AtomicBool,
) -> Result<(), EngineError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    let (mut unheard, has_left) = (None, AtomicBool::new(false));
    let outcomes = scope(|scope| {
        let (mut threads, mut followers) = (Vec::with_capacity(ranks.len()), Vec::with_capacity(ranks.len()));
        for rank in ranks {
            let (sender, orders) = channel();
            followers.push(sender);
            let builder = Builder::new().name(format!("apbd-rank-{}", rank.comm.rank()));
            let has_left = &has_left;
            threads.push(builder.spawn_scoped(scope, move || follow(&rank, Some(orders), at_once, has_left)));
        }
        unheard = obey_first_node(&mut told, &followers, || {
            let is_asked = leaves.load(Ordering::Relaxed);
            has_left.store(is_asked, Ordering::Relaxed);
            is_asked
        })
        .err();
        drop(followers);
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    match unheard {
        Some(reason) => Err(EngineError::Device { reason }),
        None => settle(outcomes),
    }
}

/// Passes what the first node decides on to the ranks, until that has no more to do; or, while there is no document in them, until `leaves` says so.
fn obey_first_node(
    told: &mut Told,
    followers: &[Sender<Arc<Command>>],
    leaves: impl Fn() -> bool,
) -> Result<(), String> {
    let mut open = HashSet::new();
    while let Some(heard) = told.hear() {
        if let Heard::Order(order) = heard {
            let command = serde_json::from_value::<Command>(order).map(Arc::new);
            let command = command.map_err(|error| format!("what the first node wants is not understood: {error}"))?;
            match &*command {
                Command::Begin { sequence, .. } => open.insert(*sequence),
                Command::End { sequence } => open.remove(sequence),
                Command::Layer { .. } | Command::Append { .. } => false,
            };
            // One that went away has aborted the communicator, or is about to.
            followers.iter().for_each(|follower| drop(follower.send(command.clone())));
        }
        if open.is_empty() && leaves() {
            break;
        }
    }
    Ok(())
}

/// Runs one job on ranks of its own, given in order. Blocks until every rank has ended.
pub fn run<B, C>(ranks: Vec<Rank<'_, B, C>>, job: &Job<'_>, driver: &mut dyn Driver) -> Result<Timing, EngineError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    check(job)?;
    let (sender, inbox) = channel();
    let (caller, to_root) = conversation::open(driver, job.new_tokens);
    let layers = ranks.first().map_or(1, |rank| rank.spec.layers);
    let query_passes = query_passes(job.plan);
    let needs = Needs { layers, layer_flops: 0.0, query_passes, kept_bytes: 0, transient_bytes: 0 };
    let _ = sender.send(Submission { job: job.into(), needs, caller });
    drop(sender);
    let limits = Limits { at_once: 1, stall: Duration::ZERO };
    scope(|scope| {
        let group = scope.spawn(|| serve(ranks, Work { inbox, limits, budget: &|_| u64::MAX, side: None }));
        let outcome = to_root.converse(driver);
        let served = group.join().unwrap_or_else(|_| Err(EngineError::Device { reason: "the group panicked".into() }));
        match (outcome, served) {
            (Outcome::Ended(result), Ok(())) => result,
            (_, Err(error)) => Err(error),
            (Outcome::Gone { .. }, Ok(())) => Err(EngineError::Device { reason: "the engine has no ranks".to_owned() }),
        }
    })
}

/// Whether a job is the one its plan was made for.
pub(super) fn check(job: &Job<'_>) -> Result<(), EngineError> {
    let (context, query) = (job.plan.context, job.plan.query);
    if (job.context.len(), job.query.len()) == (context, query) {
        return Ok(());
    }
    let (came, asked) = (job.context.len(), job.query.len());
    let reason =
        format!("the plan is for {context} tokens of context and {query} of query, there are {came} and {asked}");
    Err(EngineError::Input { reason })
}

/// Passes of a query after its context.
pub(super) fn query_passes(plan: &PrefillPlan) -> usize {
    (plan.query - plan.query_rows()).div_ceil(QUERY_CHUNK)
}

fn lead<B, C>(rank: &Rank<'_, B, C>, work: Work<'_>, followers: Vec<Sender<Arc<Command>>>) -> Result<(), RankError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    let Work { inbox, limits, budget, .. } = work;
    guarded(rank, || {
        let member = Member::new(rank, limits.at_once)?;
        // Nobody begins before every rank has its buffers.
        rank.comm.barrier()?;
        Leader::new(rank, member, followers, Schedule::new(limits), budget).lead(&inbox)?;
        Ok(rank.comm.barrier()?)
    })
}

fn follow<B, C>(
    rank: &Rank<'_, B, C>,
    orders: Option<Receiver<Arc<Command>>>,
    at_once: usize,
    has_left: &AtomicBool,
) -> Result<(), RankError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    guarded(rank, || {
        let Some(orders) = orders else { return Ok(()) };
        let mut member = Member::new(rank, at_once)?;
        rank.comm.barrier()?;
        orders.iter().try_for_each(|command| member.obey(&command))?;
        if has_left.load(Ordering::Relaxed) {
            rank.comm.abort(LEAVES);
            return Ok(());
        }
        // Nobody leaves before every rank has obeyed the last command; and whoever only waited for the next one hears of a failure.
        Ok(rank.comm.barrier()?)
    })
}

/// Runs a rank's part; whatever ends it before its time ends the others.
fn guarded<B, C>(rank: &Rank<'_, B, C>, part: impl FnOnce() -> Result<(), RankError>) -> Result<(), RankError>
where
    B: Backend,
    C: Comm<B::Matrix, B::Scores>,
{
    let mut guard = AbortOnPanic { abort: &|| rank.comm.abort("the rank panicked"), armed: true };
    let outcome = part();
    guard.armed = false;
    if let Err(error) = &outcome {
        rank.comm.abort(&error.to_string());
    }
    outcome
}

struct AbortOnPanic<'a> {
    abort: &'a dyn Fn(),
    armed: bool,
}

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if self.armed {
            (self.abort)();
        }
    }
}

/// Whether the communicator ended because a node was told to stop.
fn is_farewell(error: &CommError) -> bool {
    matches!(error, CommError::Aborted { reason, .. } if reason == LEAVES)
}

enum Failure {
    Rank(RankError),
    /// The thread could not start, or panicked.
    Thread(String),
}

type Thread<'scope> = std::io::Result<ScopedJoinHandle<'scope, Result<(), RankError>>>;

fn join(thread: Thread<'_>) -> Result<(), Failure> {
    let thread = thread.map_err(|error| Failure::Thread(format!("a rank's thread could not start: {error}")))?;
    let name = thread.thread().name().unwrap_or_default().to_owned();
    match thread.join() {
        Ok(outcome) => outcome.map_err(Failure::Rank),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Failure::Thread(format!("{name} panicked: {message}")))
        }
    }
}

/// The error that came first: what other ranks say of it is only its echo.
fn settle(outcomes: Vec<Result<(), Failure>>) -> Result<(), EngineError> {
    let echo = |failure: &Failure| matches!(failure, Failure::Rank(RankError::Comm(CommError::Aborted { .. })));
    let mut worst: Option<Failure> = None;
    for failure in outcomes.into_iter().filter_map(Result::err) {
        if worst.as_ref().is_none_or(|known| echo(known) && !echo(&failure)) {
            worst = Some(failure);
        }
    }
    match worst {
        None => Ok(()),
        Some(Failure::Thread(reason)) => Err(EngineError::Device { reason }),
        // Nothing has failed: whatever was begun can be done as it stands by the engine that follows.
        Some(Failure::Rank(RankError::Comm(left @ CommError::Aborted { .. }))) if is_farewell(&left) => {
            Err(EngineError::Unavailable { reason: left.to_string() })
        }
        // Admission let it pass, the device did not: all that is known is what was missing.
        Some(Failure::Rank(RankError::Backend(BackendError::OutOfMemory { bytes, .. }))) => {
            Err(EngineError::Memory { tokens: 0, needed_bytes: bytes as u64, available_bytes: 0 })
        }
        Some(Failure::Rank(error)) => Err(EngineError::Device { reason: error.to_string() }),
    }
}
