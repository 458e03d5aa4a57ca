//! A private RabbitMQ node.
//!
//! Invariant: its own port mapper, distribution port and data; nothing of the machine's own installation is touched but its programs.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

use super::{Group, free_port, listens, wait_until};

/// Starting takes seconds on an idle machine, and minutes on a very busy one.
const START_BOUND: Duration = Duration::from_secs(180);

/// A node with its data, which stays over restarts.
pub struct RabbitMq {
    directory: TempDir,
    server: PathBuf,
    port: u16,
    distribution_port: u16,
    mapper_port: u16,
    _mapper: Group,
    node: Option<Group>,
}

/// The node that the tests of one process share; each works with queues of its own. It ends with the process.
pub fn shared() -> &'static RabbitMq {
    static NODE: OnceLock<RabbitMq> = OnceLock::new();
    NODE.get_or_init(|| RabbitMq::start(""))
}

impl RabbitMq {
    /// Starts a node with `configuration` (lines of `rabbitmq.conf`) added to its own.
    pub fn start(configuration: &str) -> Self {
        let server = installed();
        let directory = TempDir::new().expect("a temporary directory");
        let [port, distribution_port, mapper_port] = [free_port(), free_port(), free_port()];
        let own = "loopback_users = none\nlog.file.level = warning\n";
        fs::write(directory.path().join("rabbitmq.conf"), format!("{own}{configuration}\n")).expect("written");
        fs::write(directory.path().join("plugins"), "[].\n").expect("written");
        let mapper = Group::spawn("epmd", &["-port", &mapper_port.to_string(), "-address", "127.0.0.1"], |_| ());
        wait_until("epmd", START_BOUND, || listens(mapper_port));
        let mut node = Self { directory, server, port, distribution_port, mapper_port, _mapper: mapper, node: None };
        node.restart();
        node
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        Self::url_at(self.port)
    }

    /// The same, through another port (a proxy's).
    pub fn url_at(port: u16) -> String {
        format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
    }

    /// Port for clients.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut node) = self.node.take() {
            node.kill();
        }
        wait_until("RabbitMQ's end", START_BOUND, || !listens(self.port));
    }

    /// Starts it (again) on its data and port.
    pub fn restart(&mut self) {
        self.kill();
        let at = self.directory.path().to_owned();
        let server = self.server.display().to_string();
        let log = fs::File::create(at.join("start.log")).expect("a log");
        let settings = self.settings(&at);
        self.node = Some(Group::spawn(&server, &[], |command| {
            command.envs(settings).stdout(log.try_clone().expect("a log")).stderr(log);
        }));
        let port = self.port;
        wait_until("RabbitMQ's start", START_BOUND, || speaks_amqp(port));
    }

    /// From now on it blocks every connection that publishes, as it does when its memory is full; or no more.
    pub fn block_publishers(&self, blocked: bool) {
        let of_memory = if blocked { "0" } else { "0.6" };
        let mut program = Command::new(self.server.with_file_name("rabbitmqctl"));
        program.envs(self.settings(self.directory.path())).args(["set_vm_memory_high_watermark", of_memory]);
        let done = program.output().expect("rabbitmqctl runs");
        let said = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(done.status.success(), "{said:?}");
    }

    fn settings(&self, at: &Path) -> Vec<(&'static str, String)> {
        let path = |name: &str| at.join(name).display().to_string();
        vec![
            ("HOME", path("")),
            ("RABBITMQ_NODENAME", format!("apbd-{}@localhost", self.port)),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODE_PORT", self.port.to_string()),
            ("RABBITMQ_DIST_PORT", self.distribution_port.to_string()),
            ("RABBITMQ_MNESIA_BASE", path("data")),
            ("RABBITMQ_LOG_BASE", path("log")),
            ("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf")),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins")),
            ("RABBITMQ_FEATURE_FLAGS_FILE", path("feature_flags")),
            ("RABBITMQ_PID_FILE", path("pid")),
            ("RABBITMQ_CONF_ENV_FILE", "/dev/null".to_owned()),
            // Whether a consumer holds a delivery for too long is looked at every second, not every minute.
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1} -rabbit channel_tick_interval 1000".to_owned(),
            ),
            ("ERL_EPMD_PORT", self.mapper_port.to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
        ]
    }
}

/// The server script of the versioned folder: the wrapper in the path starts the machine's own node.
fn installed() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/rabbitmq/lib").into_iter().flatten().flatten();
    let mut found = versions.map(|version| version.path().join("sbin/rabbitmq-server")).filter(|path| path.exists());
    found.next().expect("RabbitMQ is not installed: run tests/setup")
}

/// Whether the node offers a connection: a listening port alone may be a node that still recovers.
fn speaks_amqp(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return false };
    let bound = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let mut frame = [0; 1];
    bound.and_then(|()| stream.write_all(b"AMQP\x00\x00\x09\x01")).and_then(|()| stream.read_exact(&mut frame)).is_ok()
        && frame == [1]
}
