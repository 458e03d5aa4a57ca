//! The process under test, and what it left behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

/// No test waits longer for a process.
const PATIENCE: Duration = Duration::from_secs(240);

/// The documents that come with the model.
pub fn fixture_documents() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/documents")
}

/// Runs `apbd run` to its end, with `place` as its working directory.
pub fn run_in(place: &Path, paths: &[PathBuf], arguments: &[&str]) -> Ended {
    Run::of_build(place).paths(paths).arguments(arguments).wait()
}

/// A run to be started.
pub struct Run {
    command: Command,
    place: PathBuf,
}

impl Run {
    /// Of the program at this path.
    pub fn new(program: &Path, place: &Path) -> Self {
        let mut command = Command::new(program);
        // Tests run beside each other: a few threads each.
        command.arg("run").args(["--threads", "2"]).current_dir(place);
        for name in ["APBD_MODEL", "APBD_DATABASE_URL", "APBD_LOG"] {
            command.env_remove(name);
        }
        Self { command, place: place.to_owned() }
    }

    /// Of the program that was built.
    pub fn of_build(place: &Path) -> Self {
        Self::new(Path::new(env!("CARGO_BIN_EXE_apbd")), place)
    }

    pub fn paths(mut self, paths: &[PathBuf]) -> Self {
        self.command.args(paths);
        self
    }

    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn start(mut self) -> Started {
        let mut child =
            self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let mut stdout = child.stdout.take().expect("piped");
        let stdout = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).expect("UTF-8");
            text
        });
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            for line in stderr.lines().map_while(Result::ok) {
                text.push_str(&line);
                text.push('\n');
                // Nobody may be listening any more.
                let _ = sender.send(line);
            }
            text
        });
        Started { child, stdout, stderr, lines, place: self.place }
    }

    pub fn wait(self) -> Ended {
        self.start().wait()
    }

    /// Starts it and kills it as soon as it has said so many times that a document is done.
    pub fn kill_after_documents(self, count: usize) {
        let mut started = self.start();
        started.wait_for_documents(count);
        // SIGKILL: nothing can be caught or written any more.
        started.child.kill().expect("killed");
        let status = started.child.wait().expect("waited for");
        assert!(!status.success(), "it had ended before it could be killed");
    }
}

/// A run that goes on.
pub struct Started {
    child: Child,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    lines: Receiver<String>,
    place: PathBuf,
}

impl Started {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Until so many documents are done.
    pub fn wait_for_documents(&self, count: usize) {
        for _ in 0..count {
            while !self.lines.recv_timeout(PATIENCE).expect("a line").starts_with('[') {}
        }
    }

    /// Until it has taken its database.
    pub fn wait_for_database(&self) {
        let began = Instant::now();
        let lock = self.place.join("apbd.db.lock");
        while fs::read_to_string(&lock).unwrap_or_default().trim() != self.id().to_string() {
            assert!(began.elapsed() < PATIENCE, "no database after {PATIENCE:?}");
            sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to stop.
    pub fn terminate(self) -> Ended {
        // The shell's own: a bare system has no program of that name.
        let asked = Command::new("sh").arg("-c").arg(format!("kill -TERM {}", self.id())).status().expect("sh runs");
        assert!(asked.success());
        self.wait()
    }

    pub fn wait(mut self) -> Ended {
        let status = self.child.wait().expect("waited for");
        Ended { status, stdout: self.stdout.join().expect("read"), stderr: self.stderr.join().expect("read") }
    }
}

/// A run that has ended.
pub struct Ended {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Ended {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn stderr(&self) -> &str {
        &self.stderr
    }

    /// What it printed, if it ended with this exit code.
    #[track_caller]
    pub fn stdout(&self, code: i32) -> String {
        assert_eq!(self.code(), Some(code), "{}", self.stderr);
        self.stdout.clone()
    }

    /// The JSON lines it printed, if it ended with this exit code.
    #[track_caller]
    pub fn records(&self, code: i32) -> Vec<Value> {
        self.stdout(code).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// Id, attempts and state of every job in the database of `place`, by the program itself.
    pub fn attempts(&self, place: &Path) -> Vec<(String, u64, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_apbd"));
        let listed = command.args(["jobs", "--format", "json"]).current_dir(place).output().expect("runs");
        let jobs: Vec<Value> = serde_json::from_slice(&listed.stdout).expect("JSON");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        jobs.iter()
            .map(|job| (text(&job["job_id"]), job["attempt"].as_u64().expect("a number"), text(&job["state"])))
            .collect()
    }
}
