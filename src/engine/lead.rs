//! The root of a group: takes what callers submit, decides the next step, has every rank take it, and brings callers what came of it.
//!
//! Invariant: every rank gets every command, in the same order; a sequence that ends in whatever way is forgotten by all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendError};
use crate::comm::Comm;
use crate::generate::generator::Step as Chosen;
use crate::plan::QUERY_CHUNK;

use super::command::{Command, Feed, OwnedJob, SequenceId};
use super::conversation::{Timing, ToCaller};
use super::member::Member;
use super::rank::{Rank, RankError};
use super::schedule::{Needs, Schedule, Step};
use super::{EngineError, Progress};

/// How often a root without work looks whether the other ranks are still there: one that is gone must not be noticed by the next job first.
const LOOK: Duration = Duration::from_millis(250);

/// A job and the way to its caller.
pub(super) struct Submission {
    pub job: OwnedJob,
    pub needs: Needs,
    pub caller: ToCaller,
}

/// A sequence as the root sees it.
struct Active {
    caller: ToCaller,
    /// Until it begins.
    job: Option<Box<OwnedJob>>,
    needs: Needs,
    query: Vec<u32>,
    query_done: usize,
    layers_done: usize,
    /// The token that was chosen last and has not gone through.
    chosen: Option<u32>,
    began: Instant,
    /// When the first token could be chosen: context and query are through, on every rank.
    prefilled: Option<Instant>,
    /// Time spent in its own layers.
    in_layers: Duration,
}

/// The root's state.
pub(super) struct Leader<'r, 'a, B: Backend, C> {
    rank: &'r Rank<'a, B, C>,
    member: Member<'r, 'a, B, C>,
    followers: Vec<Sender<Arc<Command>>>,
    schedule: Schedule,
    /// Bytes that all sequences may take together, given those that are taken.
    budget: &'r dyn Fn(u64) -> u64,
    active: HashMap<SequenceId, Active>,
    submitted: u64,
}

impl<'r, 'a, B: Backend, C: Comm<B::Matrix, B::Scores>> Leader<'r, 'a, B, C> {
    pub fn new(
        rank: &'r Rank<'a, B, C>,
        member: Member<'r, 'a, B, C>,
        followers: Vec<Sender<Arc<Command>>>,
        schedule: Schedule,
        budget: &'r dyn Fn(u64) -> u64,
    ) -> Self {
        Self { rank, member, followers, schedule, budget, active: HashMap::new(), submitted: 0 }
    }

    /// Works until nobody can submit any more and all sequences have ended.
    pub fn lead(mut self, inbox: &Receiver<Submission>) -> Result<(), RankError> {
        while self.take_submissions(inbox)? {
            // Of a plan for fewer ranks than there are this one may need nothing of the others for the whole of a long context.
            self.rank.comm.check()?;
            self.end_cancelled()?;
            let budget = (self.budget)(self.schedule.used_bytes());
            match self.schedule.next(budget) {
                Step::Begin(id) => self.begin(id)?,
                Step::Layer(id) => self.layer(id)?,
                Step::Query(id) => self.query(id)?,
                Step::Generate(ids) => self.generate(&ids)?,
                Step::Refuse(id) => self.refuse(id, budget)?,
                Step::Wait => {}
            }
        }
        Ok(())
    }

    /// Takes all that has come, and waits for something if there is nothing to do; `false` if nothing will come and nothing is left.
    fn take_submissions(&mut self, inbox: &Receiver<Submission>) -> Result<bool, RankError> {
        loop {
            let came = match self.schedule.is_empty() {
                true => self.wait(inbox)?.ok_or(TryRecvError::Disconnected),
                false => inbox.try_recv(),
            };
            match came {
                Ok(submission) => self.add(submission),
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(!self.schedule.is_empty()),
            }
        }
    }

    /// Waits for something to do; nothing if nobody can submit any more. A communicator that ends meanwhile is an error.
    fn wait(&self, inbox: &Receiver<Submission>) -> Result<Option<Submission>, RankError> {
        loop {
            match inbox.recv_timeout(LOOK) {
                Ok(submission) => return Ok(Some(submission)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => self.rank.comm.check()?,
            }
        }
    }

    fn add(&mut self, Submission { job, needs, caller }: Submission) {
        let id = SequenceId(self.submitted);
        self.submitted += 1;
        let active = Active {
            caller,
            query: job.query.clone(),
            job: Some(Box::new(job)),
            needs,
            query_done: 0,
            layers_done: 0,
            chosen: None,
            began: Instant::now(),
            prefilled: None,
            in_layers: Duration::ZERO,
        };
        self.active.insert(id, active);
        self.schedule.add(id, needs);
    }

    /// Has every rank take a step.
    fn command(&mut self, command: Command) -> Result<(), RankError> {
        let command = Arc::new(command);
        for follower in &self.followers {
            // One that went away has aborted the communicator, or is about to.
            let _ = follower.send(command.clone());
        }
        self.member.obey(&command)
    }

    fn end_cancelled(&mut self) -> Result<(), RankError> {
        let cancelled: Vec<_> =
            self.active.iter().filter(|(_, active)| active.caller.is_cancelled()).map(|(id, _)| *id).collect();
        cancelled.into_iter().try_for_each(|id| self.end(id, Err(EngineError::Cancelled)))
    }

    fn end(&mut self, id: SequenceId, result: Result<(), EngineError>) -> Result<(), RankError> {
        self.schedule.end(id);
        (self.budget)(self.schedule.used_bytes());
        let Some(active) = self.active.remove(&id) else { return Ok(()) };
        if active.job.is_none() {
            self.command(Command::End { sequence: id })?;
        }
        let (began, prefilled) = (active.began, active.prefilled.unwrap_or_else(Instant::now));
        let timing = Timing { prefill: prefilled - began, generate: prefilled.elapsed() };
        active.caller.end(result.map(|()| timing));
        Ok(())
    }

    fn begin(&mut self, id: SequenceId) -> Result<(), RankError> {
        let layers = self.rank.spec.layers;
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        let Some(job) = active.job.take() else { return Ok(()) };
        active.began = Instant::now();
        // One rank can try and put it back; of several all have to agree, and an agreement costs more than the margin they keep.
        let spare = self.followers.is_empty().then(|| job.clone());
        match (self.command(Command::Begin { sequence: id, job }), spare) {
            (Err(RankError::Backend(error @ BackendError::OutOfMemory { .. })), Some(job)) => {
                self.out_of_memory(id, job, &error)
            }
            (result, _) => {
                result?;
                if let Some(active) = self.active.get(&id) {
                    active.caller.progress(Progress::Prefill { layers_done: 0, layers });
                }
                Ok(())
            }
        }
    }

    /// There was room by the count, but not in one piece: the sequence waits for others to end, if there are any.
    fn out_of_memory(&mut self, id: SequenceId, job: Box<OwnedJob>, error: &BackendError) -> Result<(), RankError> {
        self.schedule.put_back(id);
        let (tokens, bytes) = match error {
            BackendError::OutOfMemory { bytes, .. } => (job.context.len(), *bytes as u64),
            _ => (job.context.len(), 0),
        };
        if let Some(active) = self.active.get_mut(&id) {
            active.job = Some(job);
        }
        if self.schedule.is_idle() {
            return self.end(id, Err(EngineError::Memory { tokens, needed_bytes: bytes, available_bytes: 0 }));
        }
        Ok(())
    }

    fn refuse(&mut self, id: SequenceId, available_bytes: u64) -> Result<(), RankError> {
        let Some(active) = self.active.get(&id) else { return Ok(()) };
        let tokens = active.job.as_ref().map_or(0, |job| job.context.len());
        let needed_bytes = active.needs.kept_bytes.saturating_add(active.needs.transient_bytes);
        self.end(id, Err(EngineError::Memory { tokens, needed_bytes, available_bytes }))
    }

    fn layer(&mut self, id: SequenceId) -> Result<(), RankError> {
        let layers = self.rank.spec.layers;
        let before = Instant::now();
        self.command(Command::Layer { sequence: id })?;
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        active.in_layers += before.elapsed();
        active.layers_done += 1;
        if active.layers_done == layers {
            let flops = active.needs.layer_flops * layers as f64;
            self.schedule.learn(flops / active.in_layers.as_secs_f64());
        }
        active.caller.progress(Progress::Prefill { layers_done: active.layers_done, layers });
        let has_query = active.needs.query_passes == 0;
        if active.layers_done == layers && has_query { self.choose(&[id]) } else { Ok(()) }
    }

    /// The next tokens of the query; after the last of them the first token is chosen.
    fn query(&mut self, id: SequenceId) -> Result<(), RankError> {
        let Some(active) = self.active.get_mut(&id) else { return Ok(()) };
        let rest = &active.query[active.query_done..];
        let tokens = rest[..rest.len().min(QUERY_CHUNK)].to_vec();
        active.query_done += tokens.len();
        let is_last = active.query_done == active.query.len();
        self.command(Command::Append { feeds: vec![Feed { sequence: id, tokens }], gives_logits: is_last })?;
        if is_last { self.choose(&[id]) } else { Ok(()) }
    }

    /// A token further for each.
    fn generate(&mut self, ids: &[SequenceId]) -> Result<(), RankError> {
        let feed = |id: &SequenceId| {
            let token = self.active.get_mut(id)?.chosen.take()?;
            Some(Feed { sequence: *id, tokens: vec![token] })
        };
        let before = Instant::now();
        let feeds: Vec<Feed> = ids.iter().filter_map(feed).collect();
        let fed: Vec<SequenceId> = feeds.iter().map(|feed| feed.sequence).collect();
        self.command(Command::Append { feeds, gives_logits: true })?;
        self.choose(&fed)?;
        // The choice has waited for the device.
        self.schedule.learn_step(before.elapsed().as_secs_f64());
        Ok(())
    }

    /// Brings every caller what came of its sequence in the last pass, and takes their answers.
    fn choose(&mut self, ids: &[SequenceId]) -> Result<(), RankError> {
        let wanted: Vec<_> = ids.iter().filter_map(|id| Some(self.active.get(id)?.caller.wanted)).collect();
        let chosen = self.member.next(&wanted)?;
        // Of a communicator that has ended meanwhile these may be no logits at all.
        self.rank.comm.check()?;
        for (id, next) in ids.iter().zip(chosen) {
            if let Some(active) = self.active.get_mut(id) {
                active.prefilled.get_or_insert_with(Instant::now);
                active.caller.bring(next);
            }
        }
        for id in ids {
            let Some(active) = self.active.get_mut(id) else { continue };
            match active.caller.answer() {
                Ok(Chosen::Continue(token)) => active.chosen = Some(token),
                Ok(Chosen::Stop) => self.end(*id, Ok(()))?,
                Err(error) => self.end(*id, Err(error))?,
            }
        }
        Ok(())
    }
}
