//! The process that reads one PDF: started, given the bytes, waited for no longer than it may take, and gone.
//!
//! Invariant: whatever a document does to it, the caller gets its answer within [`WITHIN`] of its turn, and takes in no more than [`REPLY_AT_MOST`] bytes; no more than
//! [`AT_ONCE`] of them run.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use super::{Fault, Limits, Reply, TEXT_AT_MOST, Words};
use crate::document::DecodeError;

/// The hidden subcommand that the process runs.
const COMMAND: &str = "read-pdf";
/// The program that is running, also if its file was replaced since.
const SELF: &str = "/proc/self/exe";
/// Wall-clock time that the process has. It stops itself sooner, unless the machine is overloaded.
const WITHIN: Duration = Duration::from_secs(120);
/// The words, with every character of them escaped.
const REPLY_AT_MOST: u64 = 2 * TEXT_AT_MOST as u64 + 4096;
/// Processes at once; each may take the memory that one may take.
const AT_ONCE: usize = 2;

static SEATS: Seats = Seats { taken: Mutex::new(0), left: Condvar::new() };

/// The words of a PDF document, read by another process.
pub fn read(bytes: &[u8]) -> Result<Words, DecodeError> {
    let _seat = SEATS.take();
    let mut command = Command::new(program()?);
    command.arg(COMMAND);
    ask(command, bytes, WITHIN)
}

fn program() -> Result<PathBuf, DecodeError> {
    match Path::new(SELF).exists() {
        true => Ok(SELF.into()),
        false => std::env::current_exe().map_err(|error| reader(format!("own program: {error}"))),
    }
}

fn reader(reason: String) -> DecodeError {
    DecodeError::Reader { reason }
}

/// Has `command` read the bytes.
fn ask(mut command: Command, bytes: &[u8], within: Duration) -> Result<Words, DecodeError> {
    // It needs no secret of the environment. What it says on stderr may quote the document. A key that interrupts us is not for it.
    command.env_clear().process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| reader(format!("it does not start: {error}")))?;
    let heard = converse(&mut child, bytes, within);
    // Also of one that has ended by itself this is no fault.
    let _ = child.kill();
    let status = child.wait().map_err(|error| reader(format!("its end: {error}")))?;
    match heard? {
        Heard::Late => Err(malformed(format!("more than {} s are needed to read it", within.as_secs()))),
        Heard::TooMuch => Err(Fault::TooMuchText.into()),
        Heard::Reply(reply) => understand(&reply, status),
    }
}

fn malformed(reason: String) -> DecodeError {
    DecodeError::Malformed { reason }
}

/// What came of it.
enum Heard {
    Reply(Vec<u8>),
    TooMuch,
    Late,
}

/// Tells the child the document and hears its reply. Both go on until the child closes its ends; a late one is killed.
fn converse(child: &mut Child, bytes: &[u8], within: Duration) -> Result<Heard, DecodeError> {
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(reader("it has no pipes".to_owned()));
    };
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let teller = thread::Builder::new().name("apbd-pdf-in".to_owned());
        let hearer = thread::Builder::new().name("apbd-pdf-out".to_owned());
        let spawned = teller
            .spawn_scoped(scope, move || tell(stdin, bytes))
            .and_then(|_| hearer.spawn_scoped(scope, move || hear(stdout, &sender)));
        if let Err(error) = spawned {
            // Or a thread that was started would wait for it.
            let _ = child.kill();
            return Err(reader(format!("a thread: {error}")));
        }
        let heard = receiver.recv_timeout(within);
        let _ = child.kill();
        Ok(match heard {
            Ok(reply) if reply.len() as u64 > REPLY_AT_MOST => Heard::TooMuch,
            Ok(reply) => Heard::Reply(reply),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Heard::Late,
        })
    })
}

/// It may end before it has taken everything; its end tells more than the broken pipe.
fn tell(mut stdin: ChildStdin, bytes: &[u8]) {
    let _ = stdin.write_all(bytes);
}

/// What was said before a fault of the pipe is no whole reply, and is found not to be one.
fn hear(stdout: ChildStdout, to: &Sender<Vec<u8>>) {
    let mut reply = Vec::new();
    let _ = stdout.take(REPLY_AT_MOST + 1).read_to_end(&mut reply);
    let _ = to.send(reply);
}

/// The reply, or what the way in which the process ended says of the document.
fn understand(reply: &[u8], status: ExitStatus) -> Result<Words, DecodeError> {
    if let Ok(reply) = serde_json::from_slice::<Reply>(reply) {
        return reply.map_err(DecodeError::from);
    }
    let Limits { memory_bytes, processor_s } = Limits::default();
    match status.signal().and_then(Signal::from_named_raw) {
        Some(Signal::XCPU) => Err(malformed(format!("more than {processor_s} s of a processor are needed to read it"))),
        // Rust aborts when there is no memory, and when a stack overflows.
        Some(Signal::ABORT | Signal::SEGV) => {
            Err(malformed(format!("more than {} MiB of memory are needed to read it", memory_bytes >> 20)))
        }
        _ => Err(reader(format!("it ended with {status}"))),
    }
}

/// Bounds how many processes there are.
struct Seats {
    taken: Mutex<usize>,
    left: Condvar,
}

/// One of them; free again when it is dropped.
struct Seat<'a>(&'a Seats);

impl Seats {
    fn take(&self) -> Seat<'_> {
        let mut taken = self.lock();
        while *taken >= AT_ONCE {
            taken = self.left.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += 1;
        Seat(self)
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of a process that does this instead of reading.
    fn of(script: &str) -> Result<Words, DecodeError> {
        within(script, Duration::from_secs(60))
    }

    fn within(script: &str, within: Duration) -> Result<Words, DecodeError> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", script]);
        ask(shell, &[b'x'; 1 << 20], within)
    }

    fn fault(script: &str) -> String {
        of(script).expect_err("a fault").to_string()
    }

    #[test]
    fn a_reply_is_taken_also_from_a_process_that_does_not_end() {
        let reply = r#"printf '%s' '{"Ok":{"text":"words","replaced":1}}'; exec >&-; kill -STOP $$"#;
        assert_eq!(of(reply), Ok(Words { text: "words".to_owned(), replaced: 1 }));
        assert_eq!(of(r#"echo '{"Err":"Encrypted"}'"#), Err(DecodeError::Encrypted));
    }

    #[test]
    fn limits_that_were_reached_are_the_documents_fault() {
        assert!(fault("kill -XCPU $$").contains("more than 30 s of a processor"));
        assert!(fault("kill -ABRT $$").contains("more than 1024 MiB of memory"));
        let late = within("kill -STOP $$", Duration::from_secs(1)).expect_err("late").to_string();
        assert!(late.starts_with("the document is malformed: more than 1 s"), "{late}");
    }

    #[test]
    fn endless_output_is_not_taken_in() {
        assert!(fault("exec cat /dev/zero").contains("more than 64 MiB of text"));
    }

    #[test]
    fn anything_else_is_ours() {
        for script in ["exit 70", "kill -TERM $$", "echo words", r#"printf '{"Ok":{"te'"#] {
            assert!(matches!(of(script), Err(DecodeError::Reader { .. })), "{script}");
        }
        let missing = ask(Command::new("/nowhere/apbd"), b"", Duration::from_secs(2));
        assert!(matches!(missing, Err(DecodeError::Reader { .. })));
    }

    #[test]
    fn it_knows_nothing_of_our_environment() {
        assert!(std::env::var_os("PATH").is_some());
        let reply = r#"printf '{"Ok":{"text":"%s","replaced":0}}' "$CARGO_MANIFEST_DIR$HOME""#;
        assert_eq!(of(reply).map(|words| words.text), Ok(String::new()));
    }

    #[test]
    fn no_more_of_them_run_than_there_are_seats() {
        let seats = Seats { taken: Mutex::new(0), left: Condvar::new() };
        let mut taken: Vec<Seat<'_>> = (0..AT_ONCE).map(|_| seats.take()).collect();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(seats.take()));
            thread::sleep(Duration::from_millis(50));
            assert!(!waiting.is_finished());
            taken.pop();
        });
        drop(taken);
        assert_eq!(*seats.lock(), 0);
    }
}
