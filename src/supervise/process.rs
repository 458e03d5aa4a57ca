//! One child: started, spoken to, ended.
//!
//! Invariant: dropping it kills it; it is never left behind, also not by a daemon that is killed (its socket closes then).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{self, Answer, Ask};
use crate::engine::EngineInfo;

/// What came of waiting for a message.
pub(super) enum Heard {
    /// A message.
    Said(Answer),
    /// Nothing, for as long as was asked.
    Nothing,
    /// The process has ended, or says what is not understood.
    Gone(String),
}

/// A running engine.
pub(super) struct Process {
    child: Child,
    socket: UnixStream,
    answers: Receiver<io::Result<Answer>>,
}

impl Process {
    /// Starts it and waits until its model is loaded.
    pub fn start(program: &[String], within: Duration) -> Result<(Self, EngineInfo), String> {
        let mut process = Self::spawn(program).map_err(|error| format!("it could not be started: {error}"))?;
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("it was not ready within {} s", within.as_secs()));
            }
            match process.hear(left) {
                Heard::Said(Answer::Ready { info }) => return Ok((process, info)),
                Heard::Said(Answer::Unusable { reason }) | Heard::Gone(reason) => return Err(reason),
                Heard::Said(_) | Heard::Nothing => {}
            }
        }
    }

    fn spawn(program: &[String]) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let (name, arguments) = program.split_first().ok_or_else(|| io::Error::other("no program is configured"))?;
        let child = Command::new(name)
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // A Ctrl-C for the daemon is not one for the engine: the daemon drains.
            .process_group(0)
            .spawn()?;
        let (sender, answers) = mpsc::channel();
        let mut reader = ours.try_clone()?;
        // Ends with the process: its socket closes then.
        thread::Builder::new().name("apbd-engine-ear".to_owned()).spawn(move || {
            while let Some(heard) = wire::read(&mut reader).transpose() {
                let broken = heard.is_err();
                if sender.send(heard).is_err() || broken {
                    return;
                }
            }
        })?;
        Ok(Self { child, socket: ours, answers })
    }

    /// Its process id, for logs.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Says something; `false` if nobody listens any more.
    pub fn say(&mut self, ask: &Ask) -> bool {
        wire::write(&mut self.socket, ask).is_ok()
    }

    /// Waits for a message.
    pub fn hear(&mut self, wait: Duration) -> Heard {
        match self.answers.recv_timeout(wait) {
            Ok(Ok(answer)) => Heard::Said(answer),
            Ok(Err(error)) => Heard::Gone(format!("what it says is not understood: {error}")),
            Err(RecvTimeoutError::Timeout) => Heard::Nothing,
            Err(RecvTimeoutError::Disconnected) => Heard::Gone(self.ending()),
        }
    }

    /// How it ended; a process that closed its socket is made to.
    fn ending(&mut self) -> String {
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return format!("{status}");
            }
            thread::sleep(Duration::from_millis(10));
        }
        "it closed its socket".to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL is the last word, also for a process that is stopped or stuck in a driver call.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
