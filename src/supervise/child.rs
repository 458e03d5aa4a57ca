//! The engine's process: asks come in and answers go out over the socket it has as its standard input.
//!
//! Requests run side by side, as many as the engine takes at a time, each on a thread of its own; what is more waits in the order in which it
//! came. Plans have another thread, so that none waits behind an inference. None of the threads is joined: all end with the process.
//!
//! Invariant: when the daemon is gone the process ends, whatever it was at, loading its model or waiting for other nodes included.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use super::wire::{self, Answer, Ask};
use crate::engine::{Engine, EngineError, InferOutcome, InferRequest};

/// Requests at a time, whatever an engine says of itself.
const AT_ONCE: usize = 1024;
/// How often an engine is asked whether it is over.
const LOOK: Duration = Duration::from_millis(250);

/// A request and what its caller may want of it later.
struct Request {
    id: u64,
    request: Box<InferRequest>,
    cancelled: Arc<AtomicBool>,
}

/// Requests that have not ended, by their ids, and whether they are cancelled.
#[derive(Clone, Default)]
struct Open(Arc<Mutex<HashMap<u64, Arc<AtomicBool>>>>);

/// What the threads of the process share.
struct Desk {
    engine: Arc<dyn Engine>,
    answers: Mutex<UnixStream>,
    open: Open,
}

/// Serves `open`'s engine until the daemon closes the socket.
pub fn serve(open: impl FnOnce() -> Result<Arc<dyn Engine>, String>) -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut answers = socket.try_clone()?;
    let (requests, waiting) = mpsc::channel();
    let (plans, planned) = mpsc::channel();
    let requested = Open::default();
    let ear = requested.clone();
    named("apbd-asks").spawn(move || ear.listen(socket, &requests, &plans))?;
    let engine = match open() {
        Ok(engine) => engine,
        Err(reason) => return wire::write(&mut answers, &Answer::Unusable { reason }),
    };
    let info = engine.info();
    let at_once = info.concurrency.clamp(1, AT_ONCE);
    wire::write(&mut answers, &Answer::Ready { info })?;
    let desk = Arc::new(Desk { engine, answers: Mutex::new(answers), open: requested });
    let waiting = Arc::new(Mutex::new(waiting));
    for number in 0..at_once {
        let (desk, waiting) = (desk.clone(), waiting.clone());
        named(&format!("apbd-request-{number}")).spawn(move || desk.infer_all(&waiting))?;
    }
    let planner = desk.clone();
    named("apbd-plans").spawn(move || planner.plan_all(&planned))?;
    desk.watch()
}

fn named(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.to_owned())
}

impl Open {
    /// Reads asks and passes them on; a cancel takes effect at once. Ends with the process.
    fn listen(&self, mut socket: UnixStream, requests: &mpsc::Sender<Request>, plans: &mpsc::Sender<Ask>) -> ! {
        loop {
            match wire::read::<Ask>(&mut socket) {
                Ok(Some(Ask::Cancel { id })) => {
                    if let Some(cancelled) = self.all().get(&id) {
                        cancelled.store(true, Ordering::Relaxed);
                    }
                }
                Ok(Some(Ask::Infer { id, request })) => {
                    let cancelled = Arc::new(AtomicBool::new(false));
                    self.all().insert(id, cancelled.clone());
                    // Its takers live as long as this thread.
                    let _ = requests.send(Request { id, request, cancelled });
                }
                Ok(Some(plan @ Ask::Plan { .. })) => {
                    let _ = plans.send(plan);
                }
                // The engine may be deep in a layer: nobody wants its result.
                Ok(None) | Err(_) => process::exit(0),
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Arc<AtomicBool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desk {
    /// Tells once that the engine is over. Ends with the process.
    fn watch(&self) -> ! {
        let mut is_told = false;
        loop {
            thread::sleep(LOOK);
            if let Some(reason) = self.engine.over().filter(|_| !is_told) {
                self.answer(&Answer::Over { reason });
                is_told = true;
            }
        }
    }

    /// Runs requests, one after the other.
    fn infer_all(&self, waiting: &Mutex<mpsc::Receiver<Request>>) {
        loop {
            // Held while there is nothing to do; never while something is done.
            let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Request { id, request, cancelled }) = next else { return };
            let result = self.infer(id, &request, &cancelled);
            self.open.all().remove(&id);
            self.answer(&Answer::Done { id, result: result.map(Box::new) });
        }
    }

    fn infer(&self, id: u64, request: &InferRequest, cancelled: &AtomicBool) -> Result<InferOutcome, EngineError> {
        if cancelled.load(Ordering::Relaxed) {
            return Err(EngineError::Cancelled);
        }
        guarded(|| {
            self.engine.infer(request, &|progress| {
                self.answer(&Answer::Progress { id, progress });
                !cancelled.load(Ordering::Relaxed)
            })
        })
    }

    fn plan_all(&self, asked: &mpsc::Receiver<Ask>) {
        for ask in asked {
            if let Ask::Plan { id, context, query, query_at, attention, new_tokens } = ask {
                let result = guarded(|| self.engine.plan(context, query, query_at, &attention));
                let demand = result.as_ref().ok().and_then(|plan| self.engine.demand(plan, new_tokens));
                self.answer(&Answer::Planned { id, result: result.map(Box::new), demand });
            }
        }
    }

    fn answer(&self, answer: &Answer) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if wire::write(&mut *answers, answer).is_err() {
            // A daemon that is not there any more wants nothing.
            process::exit(0);
        }
    }
}

/// A panic as an error. The daemon replaces the process; of the requests in it the one that panicked is to blame.
fn guarded<T>(call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    let panicked = || EngineError::Crashed { reason: "it panicked; its message is in the log".to_owned() };
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(panicked()))
}
