//! A private object store with the semantics of S3, which checks signatures.
//!
//! Invariant: only the key that it gives may do anything; its data is in memory and ends with it.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::{Group, first_line, python};

const SERVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/services/s3_server.py");

/// The server, and a key that may do everything.
pub struct S3 {
    /// Where it listens.
    pub port: u16,
    /// Access key.
    pub access_key_id: String,
    /// Its secret.
    pub secret_access_key: String,
    _server: Group,
}

/// The server that the tests of one process share; each works with buckets of its own.
pub fn shared() -> &'static S3 {
    static SERVER: OnceLock<S3> = OnceLock::new();
    SERVER.get_or_init(S3::start)
}

impl S3 {
    /// Starts a server.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// Starts a server with a bucket of so many objects below `drop/`.
    pub fn with_many(bucket: &str, count: usize) -> Self {
        Self::start_with(Some(format!("{bucket}:{count}")))
    }

    fn start_with(many: Option<String>) -> Self {
        let program = python("python").display().to_string();
        let mut server = Group::spawn(&program, &[SERVER], |command| {
            command.stdout(Stdio::piped()).stderr(Stdio::null()).envs(many.map(|many| ("MANY", many)));
        });
        let line = first_line(&mut server.take_stdout());
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("the S3 server did not start: {line}"));
        let text = |key: &str| said[key].as_str().expect("a text").to_owned();
        let port = said["port"].as_u64().expect("a port") as u16;
        let (access_key_id, secret_access_key) = (text("access_key_id"), text("secret_access_key"));
        Self { port, access_key_id, secret_access_key, _server: server }
    }

    /// Lets a bucket keep versions from now on.
    pub fn keep_versions(&self, bucket: &str) {
        let code = "import boto3, sys\n\
                    s3 = boto3.client('s3', endpoint_url=sys.argv[1], region_name='us-east-1', aws_access_key_id=sys.argv[2], \
                    aws_secret_access_key=sys.argv[3])\n\
                    s3.put_bucket_versioning(Bucket=sys.argv[4], VersioningConfiguration={'Status': 'Enabled'})";
        let arguments = [&self.endpoint(), &self.access_key_id, &self.secret_access_key, bucket];
        let done = Command::new(python("python")).args(["-c", code]).args(arguments).status();
        assert!(done.expect("python runs").success());
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}
