//! Stderr, shared between progress bars, log lines and messages, so that none overwrites another.
//!
//! Invariant: everything on stderr goes through [`progress`], [`line`] or [`LogWriter`].

use std::io::{self, Write};
use std::sync::LazyLock;

use indicatif::MultiProgress;

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Where progress bars are added; drawn on stderr, and only if that is a terminal.
pub fn progress() -> &'static MultiProgress {
    &BARS
}

/// Prints a line for people above the bars. A closed stderr is ignored: there is nobody to tell.
pub fn line(text: &str) {
    write_above(format!("{text}\n").as_bytes());
}

fn write_above(bytes: &[u8]) {
    BARS.suspend(|| {
        let _ = io::stderr().lock().write_all(bytes);
    });
}

/// Writer of one log event: collects it, and prints it whole above the bars.
#[derive(Debug, Default)]
pub struct LogWriter(Vec<u8>);

impl LogWriter {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        write_above(&self.0);
    }
}
