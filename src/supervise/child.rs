//! The engine's process: asks come in and answers go out over the socket it has as its standard input.
//!
//! Invariant: when the daemon is gone the process ends, whatever it was at.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use super::wire::{self, Answer, Ask};
use crate::engine::{Engine, InferRequest};

/// Serves `open`'s engine until the daemon closes the socket.
pub fn serve(open: impl FnOnce() -> Result<Arc<dyn Engine>, String>) -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let answers = Mutex::new(socket.try_clone()?);
    let answer = |answer: &Answer| wire::write(&mut *answers.lock().unwrap_or_else(PoisonError::into_inner), answer);
    let engine = match open() {
        Ok(engine) => engine,
        Err(reason) => return answer(&Answer::Unusable { reason }),
    };
    answer(&Answer::Ready { info: engine.info() })?;
    let cancelled = Arc::new(AtomicBool::new(false));
    let (asks, asked) = mpsc::channel();
    let listener = Arc::clone(&cancelled);
    thread::Builder::new().name("apbd-asks".to_owned()).spawn(move || listen(socket, &asks, &listener))?;
    while let Ok(ask) = asked.recv() {
        match ask {
            Ask::Infer { request } => {
                let result = infer(&*engine, &request, &cancelled, &answer);
                answer(&Answer::Done { result: result.map(Box::new) })?;
            }
            Ask::Plan { context, query, query_at, attention } => {
                let result = engine.plan(context, query, query_at, &attention);
                answer(&Answer::Planned { result: result.map(Box::new) })?;
            }
            Ask::Cancel => {}
        }
    }
    Ok(())
}

fn infer(
    engine: &dyn Engine,
    request: &InferRequest,
    cancelled: &AtomicBool,
    answer: &(impl Fn(&Answer) -> io::Result<()> + Sync),
) -> Result<crate::engine::InferOutcome, crate::engine::EngineError> {
    engine.infer(request, &|progress| {
        // A daemon that is not there any more wants nothing.
        answer(&Answer::Progress { progress }).is_ok() && !cancelled.load(Ordering::Relaxed)
    })
}

/// Reads asks; a cancel takes effect at once, the others wait for their turn.
fn listen(mut socket: UnixStream, asks: &mpsc::Sender<Ask>, cancelled: &AtomicBool) {
    loop {
        match wire::read::<Ask>(&mut socket) {
            Ok(Some(Ask::Cancel)) => cancelled.store(true, Ordering::Relaxed),
            Ok(Some(ask)) => {
                cancelled.store(false, Ordering::Relaxed);
                if asks.send(ask).is_err() {
                    return;
                }
            }
            // The engine may be deep in a layer: nobody wants its result.
            Ok(None) | Err(_) => process::exit(0),
        }
    }
}
