//! A process with all its children, which ends with its owner: with a drop, and also when the test's process dies.
//!
//! Invariant: nothing that was started here outlives the test's process, however that ended.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The shell that leads the group: it waits for the end of its own input, which comes when the owner is gone.
const LEADER: &str = r#""$@" </dev/null & read _; kill -KILL 0"#;

/// A process group.
pub struct Group {
    leader: Child,
    alive: Option<ChildStdin>,
}

impl Group {
    /// Starts `program`; its environment is what `prepare` makes of it.
    pub fn spawn(program: &str, arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", LEADER, "sh", program]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        prepare(&mut command);
        let mut leader = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
        let alive = leader.stdin.take();
        Self { leader, alive }
    }

    /// What it writes, if `prepare` asked for a pipe.
    pub fn take_stdout(&mut self) -> ChildStdout {
        self.leader.stdout.take().expect("stdout was asked for")
    }

    /// Sends a signal to all of them.
    pub fn signal(&self, name: &str) {
        let group = format!("-{}", self.leader.id());
        let status = Command::new("sh").args(["-c", "kill -$0 -- $1 2>/dev/null", name, &group]).status();
        assert!(status.is_ok(), "kill could not be run");
    }

    /// Kills all of them, at once.
    pub fn kill(&mut self) {
        self.signal("KILL");
        self.alive = None;
        // It was killed: its status says nothing.
        let _ = self.leader.wait();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads up to the first line's end.
pub fn first_line(from: &mut impl Read) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while from.read(&mut byte).is_ok_and(|count| count == 1) && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}
