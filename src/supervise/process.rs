//! One child: started, spoken to by many at once, ended.
//!
//! Invariant: dropping it kills it; it is never left behind, also not by a daemon that is killed (its socket closes then). Who waits for an
//! answer learns of its end at once.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wire::{self, Answer, Ask};
use crate::engine::EngineInfo;

/// The id under which the first message comes in.
const GREETING: u64 = 0;
/// How often a wait for a model looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(100);

/// A running engine.
pub(super) struct Process {
    id: u32,
    child: Mutex<Child>,
    socket: Mutex<UnixStream>,
    board: Arc<Board>,
    ear: Option<JoinHandle<()>>,
}

/// Who waits for which answer.
struct Board(Mutex<Callers>);

struct Callers {
    /// By the ids of their requests; none after the end.
    waiting: HashMap<u64, Sender<Answer>>,
    /// Why nothing comes any more.
    ended: Option<String>,
    /// Why it can do nothing any more, by its own word.
    over: Option<String>,
    /// When the process last gave a sign of life, or was last idle.
    heard_at: Instant,
}

/// One caller's place at the board.
pub(super) struct Call<'a> {
    id: u64,
    process: &'a Process,
    /// Closed at the end of the process, after all that it said.
    pub answers: Receiver<Answer>,
}

impl Process {
    /// Starts it and waits until its model is loaded. `silence_at_most` is how long it may take to read what it is told.
    pub fn start(
        program: &[String],
        environment: &[(String, String)],
        within: Duration,
        silence_at_most: Duration,
        stop: &AtomicBool,
    ) -> Result<(Self, EngineInfo), String> {
        let (greetings, greeting) = mpsc::channel();
        let spawned = Self::spawn(program, environment, greetings, silence_at_most);
        let process = spawned.map_err(|error| format!("it could not be started: {error}"))?;
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            match greeting.recv_timeout(TICK) {
                Ok(Answer::Ready { info }) => {
                    process.board.callers().waiting.remove(&GREETING);
                    return Ok((process, info));
                }
                Ok(Answer::Unusable { reason }) => return Err(reason),
                Ok(_) | Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(process.ending()),
            }
            if stop.load(Ordering::Relaxed) {
                return Err("it is not needed any more".to_owned());
            }
        }
        Err(format!("it was not ready within {} s", within.as_secs()))
    }

    fn spawn(
        program: &[String],
        environment: &[(String, String)],
        greetings: Sender<Answer>,
        silence_at_most: Duration,
    ) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        // A child that does not read must not hold up who speaks to it.
        ours.set_write_timeout(Some(silence_at_most.max(TICK)))?;
        let (name, arguments) = program.split_first().ok_or_else(|| io::Error::other("no program is configured"))?;
        let child = Command::new(name)
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // A Ctrl-C for the daemon is not one for the engine: the daemon drains.
            .process_group(0)
            .spawn()?;
        let waiting = HashMap::from([(GREETING, greetings)]);
        let board = Arc::new(Board(Mutex::new(Callers { waiting, ended: None, over: None, heard_at: Instant::now() })));
        let mut process = Self {
            id: child.id(),
            child: Mutex::new(child),
            socket: Mutex::new(ours),
            board: board.clone(),
            ear: None,
        };
        let mut reader = process.socket().try_clone()?;
        let ear = thread::Builder::new().name("apbd-engine-ear".to_owned());
        process.ear = Some(ear.spawn(move || board.listen(&mut reader))?);
        Ok(process)
    }

    /// Its process id, for logs.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// A place for the answers to `id`, which nobody has used before.
    pub fn call(&self, id: u64) -> Call<'_> {
        let (sender, answers) = mpsc::channel();
        let mut callers = self.board.callers();
        if callers.ended.is_none() {
            if callers.waiting.is_empty() {
                callers.heard_at = Instant::now();
            }
            callers.waiting.insert(id, sender);
        }
        Call { id, process: self, answers }
    }

    /// Says something; `false` if nobody listens any more.
    pub fn say(&self, ask: &Ask) -> bool {
        wire::write(&mut *self.socket(), ask).is_ok()
    }

    /// How long it has not said anything, while it had something to do.
    pub fn silent_for(&self) -> Duration {
        self.board.callers().heard_at.elapsed()
    }

    /// Whether nothing comes from it any more.
    pub fn has_ended(&self) -> bool {
        self.board.callers().ended.is_some()
    }

    /// Why it can do nothing any more, if it has said so.
    pub fn over(&self) -> Option<String> {
        self.board.callers().over.clone()
    }

    /// How it ended; a process that closed its socket, or says what is not understood, is made to.
    pub fn ending(&self) -> String {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child().try_wait() {
                return format!("{status}");
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.board.callers().ended.clone().unwrap_or_else(|| "it closed its socket".to_owned())
    }

    /// Ends it. SIGKILL is the last word, also for a process that is stopped or stuck in a driver call.
    pub fn kill(&self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self) -> MutexGuard<'_, UnixStream> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        // Whoever else holds the other end: the ear hears the end.
        let _ = self.socket().shutdown(Shutdown::Both);
        if let Some(ear) = self.ear.take() {
            // That it panicked has been printed by the thread itself.
            let _ = ear.join();
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.process.board.callers().waiting.remove(&self.id);
    }
}

impl Board {
    fn callers(&self) -> MutexGuard<'_, Callers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes answers on until there are no more.
    fn listen(&self, reader: &mut UnixStream) {
        let ended = loop {
            match wire::read::<Answer>(reader) {
                Ok(Some(answer)) => self.pass_on(answer),
                Ok(None) => break "it closed its socket".to_owned(),
                Err(error) => break format!("what it says is not understood: {error}"),
            }
        };
        let mut callers = self.callers();
        callers.ended = Some(ended);
        callers.waiting.clear();
    }

    fn pass_on(&self, answer: Answer) {
        let mut callers = self.callers();
        callers.heard_at = Instant::now();
        if let Answer::Over { reason } = answer {
            callers.over = Some(reason);
            return;
        }
        // Whoever gave up has no place any more.
        if let Some(caller) = callers.waiting.get(&answer.id().unwrap_or(GREETING)) {
            let _ = caller.send(answer);
        }
    }
}
