//! A private PostgreSQL: its own data directory, a free port of the loopback interface, gone with the test's process.
//!
//! Invariant: it refuses to be absent: without the server's programs a test fails and says what to install.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Superuser of the server, trusted without a password.
pub const OWNER: &str = "owner";

/// The shell that keeps the server: it waits for the end of its own input, which comes when the test's process is gone
/// (killed or not), and then ends the server at once.
const KEEPER: &str = r#""$@" </dev/null & server=$!; read _; kill -QUIT $server; wait $server"#;

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(60);

/// A server.
pub struct Postgres {
    directory: TempDir,
    programs: PathBuf,
    port: u16,
    user: Option<(u32, u32)>,
    /// Settings beside the usual ones.
    settings: Vec<String>,
    keeper: Option<Child>,
}

/// One server for all tests of this process.
pub fn shared() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(Postgres::start)
}

impl Postgres {
    /// Makes a cluster and starts its server.
    pub fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("apbd-postgres-").tempdir().expect("a temporary directory");
        let user = unprivileged();
        if let Some((user, group)) = user {
            chown(directory.path(), Some(user), Some(group)).expect("the directory changes hands");
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).expect("the directory is closed");
        let (programs, port, settings) = (programs(), free_port(), Vec::new());
        let mut server = Self { directory, programs, port, user, settings, keeper: None };
        server.init();
        server.restart();
        server
    }

    /// Starts it again with TLS for who asks for it.
    pub fn restart_with_tls(&mut self, certificate: &Path, key: &Path) {
        let files = [(certificate, "server.pem"), (key, "server.key")];
        for (from, name) in files {
            let to = self.directory.path().join(name);
            fs::copy(from, &to).expect("copied");
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).expect("closed");
            if let Some((user, group)) = self.user {
                chown(&to, Some(user), Some(group)).expect("the file changes hands");
            }
        }
        let path = |name: &str| self.directory.path().join(name).display().to_string();
        self.settings = vec![
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", path("server.pem")),
            format!("ssl_key_file={}", path("server.key")),
        ];
        self.restart();
    }

    /// URL of `database` for `role`.
    pub fn url(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}", self.port)
    }

    /// Directory of the Unix socket.
    pub fn socket_directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its client for the command line.
    pub fn psql(&self) -> PathBuf {
        self.programs.join("psql")
    }

    /// URL of a new empty database, for its owner.
    pub fn database(&self) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        self.url(OWNER, &name)
    }

    /// Runs SQL as the owner; returns what `psql` prints, unaligned.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let mut psql = self.command("psql");
        psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &self.url(OWNER, database), "-c", sql]);
        let output = psql.output().expect("psql runs");
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    /// Ends the server as a crash would: no checkpoint, connections cut.
    pub fn stop(&mut self) {
        let Some(mut keeper) = self.keeper.take() else { return };
        drop(keeper.stdin.take());
        keeper.wait().expect("the server's keeper ends");
    }

    /// Starts it again on the same port and data.
    pub fn restart(&mut self) {
        self.stop();
        let log = fs::File::create(self.directory.path().join("server.log")).expect("a log file");
        let data = self.directory.path().join("data");
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh"]).arg(self.programs.join("postgres")).arg("-D").arg(&data);
        keeper.arg("-p").arg(self.port.to_string()).arg("-k").arg(self.directory.path());
        keeper.args(["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"]);
        for setting in &self.settings {
            keeper.args(["-c", setting]);
        }
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).current_dir(self.directory.path());
        self.demote(&mut keeper);
        self.keeper = Some(keeper.spawn().expect("sh runs"));
        self.wait_until_ready();
    }

    fn wait_until_ready(&mut self) {
        let start = Instant::now();
        loop {
            let mut ready = self.command("pg_isready");
            ready.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
            if ready.status().expect("pg_isready runs").success() {
                return;
            }
            if start.elapsed() > START {
                let log = fs::read_to_string(self.directory.path().join("server.log")).unwrap_or_default();
                panic!("PostgreSQL was not ready within {START:?}: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn init(&self) {
        let mut initdb = self.command("initdb");
        initdb.args(["--no-locale", "-E", "UTF8", "-A", "trust", "-U", OWNER, "--no-sync", "-D"]);
        let output = initdb.arg(self.directory.path().join("data")).output().expect("initdb runs");
        assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        // The directory the tests run in may be closed to the other user.
        command.current_dir(self.directory.path());
        self.demote(&mut command);
        command
    }

    /// The server's programs refuse to run as root.
    fn demote(&self, command: &mut Command) {
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Directory of the server's programs: in PATH, or where Debian has them, the newest version first.
fn programs() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
    let mut versions: Vec<PathBuf> =
        versions.map(|entry| entry.path()).filter(|path| version(path).is_some()).collect();
    versions.sort_by_key(|path| std::cmp::Reverse(version(path)));
    places.splice(0..0, versions.into_iter().map(|path| path.join("bin")));
    let complete = |place: &PathBuf| ["postgres", "initdb", "psql"].iter().all(|name| place.join(name).is_file());
    places.into_iter().find(complete).unwrap_or_else(|| {
        panic!("PostgreSQL is not installed: these tests start a server of their own. Run tests/setup, or apt-get install postgresql")
    })
}

/// A user and a group that the server may run as, if this process is root's.
fn unprivileged() -> Option<(u32, u32)> {
    let own = fs::metadata("/proc/self").map(|own| std::os::unix::fs::MetadataExt::uid(&own)).expect("/proc is there");
    if own != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
    let ids = |name: &str| {
        let fields: Vec<&str> = users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f[0] == name)?;
        Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).expect("a user 'postgres' or 'nobody'"))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of the loopback interface");
    listener.local_addr().expect("bound").port()
}
