//! A group at work: ranks that live as long as the engine, and callers that submit to them.
//!
//! Invariant: a group that failed serves nobody again; the next caller finds a new one, connected anew.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::comm::hub::Side;
use crate::model::ModelSpec;
use crate::plan::Footprint;

use super::EngineError;
use super::command::Job;
use super::conversation::{self, Driver, Outcome, Timing};
use super::devices::{Connected, Devices, Memory};
use super::lead::Submission;
use super::rank::Rank;
use super::ranks::{Following, Work, follow_first_node, serve};
use super::schedule::{Limits, Needs};

/// The part of the memory that stays free where several sequences share it.
const MARGIN_PART: u64 = 20;

/// A model's shapes and the devices it is on.
pub(super) struct Model<D> {
    pub spec: ModelSpec,
    pub devices: D,
}

impl<D: Devices> Model<D> {
    /// Bytes that there are for sequences and for what is held whatever is done, those that sequences have taken included.
    pub fn memory(&self, used_bytes: u64) -> u64 {
        let (Memory::Shared(left) | Memory::Each(left)) = self.devices.memory();
        left.saturating_add(used_bytes)
    }

    /// Bytes that are held whatever is done.
    pub fn fixed_bytes(&self, limits: &Limits) -> u64 {
        let ranks = self.devices.ranks();
        let of_rank = self.footprint().fixed_memory(ranks, limits.at_once);
        match self.devices.memory() {
            Memory::Shared(_) => of_rank * ranks as u64,
            Memory::Each(_) => of_rank,
        }
    }

    /// What of the model decides about memory and work.
    pub fn footprint(&self) -> Footprint {
        let (spec, shape) = (&self.spec, self.spec.shape);
        Footprint {
            layers: spec.layers,
            hidden: spec.hidden,
            intermediate: spec.intermediate,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            vocab: spec.vocab,
            element_bytes: self.devices.element_bytes(),
            kept_row_bytes: self.devices.kept_row_bytes(shape),
            scratch_bytes: self.devices.scratch_bytes(spec),
        }
    }

    /// Bytes that sequences together may take. Beside others one may find no room in one piece, so some is left free.
    fn budget(&self, used_bytes: u64, limits: &Limits) -> u64 {
        let all = self.memory(used_bytes).saturating_sub(self.fixed_bytes(limits));
        if used_bytes > 0 { all - all / MARGIN_PART } else { all }
    }
}

impl<D: Devices> Model<D> {
    /// The ranks of this process.
    fn ranks<'a>(&'a self, backends: &'a [Arc<D::Backend>], comms: Vec<D::Comm>) -> Vec<Rank<'a, D::Backend, D::Comm>> {
        let rank = |(index, (backend, comm)): (usize, (&'a Arc<D::Backend>, D::Comm))| Rank {
            backend: &**backend,
            comm,
            weights: self.devices.weights(index),
            spec: &self.spec,
        };
        backends.iter().zip(comms).enumerate().map(rank).collect()
    }

    /// Does what the first node decides, until it has no more to do or this one leaves. Blocks.
    pub fn follow(&self, limits: &Limits, terms: &Following<'_>) -> Result<(), EngineError> {
        let Connected { members, side } = self.devices.connect()?;
        let Some(Side::Other(told)) = side else {
            return Err(EngineError::Input {
                reason: "this node is the first of its group, or the only one".to_owned(),
            });
        };
        (terms.joined)();
        let (backends, comms): (Vec<_>, Vec<_>) = members.into_iter().unzip();
        follow_first_node(self.ranks(&backends, comms), told, limits.at_once, terms.leaves)
    }
}

/// Threads at work on a model.
pub(super) struct Group {
    /// Closed when the group is to end.
    inbox: Option<Sender<Submission>>,
    thread: Option<JoinHandle<()>>,
    ending: Arc<Ending>,
    /// Bytes that sequences have taken.
    taken: Arc<AtomicU64>,
}

/// How the group ended, once it has.
#[derive(Default)]
struct Ending {
    result: Mutex<Option<Result<(), EngineError>>>,
    ended: Condvar,
}

impl Group {
    /// Connects the ranks and starts their threads.
    pub fn start<D: Devices>(model: &Arc<Model<D>>, limits: Limits) -> Result<Self, EngineError> {
        let Connected { members, side } = model.devices.connect()?;
        let (sender, inbox) = channel();
        let ending = Arc::new(Ending::default());
        let taken = Arc::new(AtomicU64::new(0));
        let (model, end, used) = (model.clone(), ending.clone(), taken.clone());
        let work = move || {
            let (backends, comms): (Vec<_>, Vec<_>) = members.into_iter().unzip();
            let ranks = model.ranks(&backends, comms);
            let budget = |used_bytes| {
                used.store(used_bytes, Ordering::Relaxed);
                model.budget(used_bytes, &limits)
            };
            let served = serve(ranks, Work { inbox, limits, budget: &budget, side });
            end.say(served);
        };
        let thread = Builder::new()
            .name("apbd-group".to_owned())
            .spawn(work)
            .map_err(|error| EngineError::Device { reason: format!("the group's thread could not start: {error}") })?;
        Ok(Self { inbox: Some(sender), thread: Some(thread), ending, taken })
    }

    /// Whether it can still be submitted to.
    pub fn is_alive(&self) -> bool {
        self.ending.result.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// How it has ended, if it has.
    pub fn ending(&self) -> Option<String> {
        match self.ending.result.lock().unwrap_or_else(PoisonError::into_inner).as_ref()? {
            Ok(()) => Some("it was closed".to_owned()),
            Err(EngineError::Device { reason } | EngineError::Unavailable { reason }) => Some(reason.clone()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Bytes that its sequences have taken.
    pub fn used_bytes(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// A way to submit that outlives the borrow of the group.
    pub fn door(&self) -> Door {
        Door { inbox: self.inbox.clone(), ending: self.ending.clone() }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            // It has said how it ended; a panic has been printed by its own thread.
            let _ = thread.join();
        }
    }
}

impl Ending {
    fn say(&self, result: Result<(), EngineError>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.ended.notify_all();
    }

    /// Waits for the end; every rank ends soon after the first that failed.
    fn wait(&self) -> EngineError {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*result {
                Some(Err(error)) => return error.clone(),
                Some(Ok(())) => return EngineError::Unavailable { reason: "the engine was closed".to_owned() },
                None => result = self.ended.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Where callers submit.
pub(super) struct Door {
    inbox: Option<Sender<Submission>>,
    ending: Arc<Ending>,
}

impl Door {
    /// Submits a job and holds the conversation to its end.
    pub fn run(self, job: &Job<'_>, needs: Needs, driver: &mut dyn Driver) -> Result<Timing, EngineError> {
        let (caller, to_root) = conversation::open(driver, job.new_tokens);
        let submission = Submission { job: job.into(), needs, caller };
        let had_begun = match self.inbox.map(|inbox| inbox.send(submission).is_ok()) {
            Some(true) => match to_root.converse(driver) {
                Outcome::Ended(result) => return result,
                Outcome::Gone { had_begun } => had_begun,
            },
            _ => false,
        };
        Err(match self.ending.wait() {
            EngineError::Memory { needed_bytes, available_bytes, .. } => {
                EngineError::Memory { tokens: job.context.len(), needed_bytes, available_bytes }
            }
            error if had_begun => error,
            error @ EngineError::Unavailable { .. } => error,
            // It is none of the jobs that the engine failed on.
            error => EngineError::Unavailable { reason: error.to_string() },
        })
    }
}
