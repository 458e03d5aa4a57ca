//! The other side of [`process`](super::process): confines itself, reads one document, answers.
//!
//! Invariant: nothing of the document is looked at before the limits are in force.

use std::io::{self, Read, Write};
use std::thread;

use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};

use super::{Fault, Limits, Reply, letters};

/// Objects may lie in each other, and are read by functions that call each other.
const STACK: usize = 64 << 20;

/// Reads a document from `input` and writes what it says to `output`. For a process of its own, which is confined from here on.
pub fn answer(mut input: impl Read, output: impl Write, limits: Limits) -> io::Result<()> {
    confine(limits)?;
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes)?;
    serde_json::to_writer(output, &read(bytes)?).map_err(io::Error::from)
}

/// A panic is the document's fault: nothing else is done here.
fn read(bytes: Vec<u8>) -> io::Result<Reply> {
    let reader = thread::Builder::new().name("apbd-pdf".to_owned()).stack_size(STACK);
    let read = reader.spawn(move || letters::read(bytes))?;
    Ok(read.join().unwrap_or(Err(Fault::Damaged)))
}

/// It may compute and answer: no more memory, no more time, no file, no core dump with a document in it. It ends with whoever started it.
fn confine(limits: Limits) -> io::Result<()> {
    let at_most = |resource, soft: u64, hard: u64| {
        setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) }).map_err(io::Error::from)
    };
    at_most(Resource::As, limits.memory_bytes, limits.memory_bytes)?;
    // Past the first limit it is told to end, past the second it is made to.
    at_most(Resource::Cpu, limits.processor_s, limits.processor_s + 1)?;
    at_most(Resource::Fsize, 0, 0)?;
    at_most(Resource::Core, 0, 0)?;
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
}
