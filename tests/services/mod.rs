//! Private instances of the real services, each with own ports and a temporary directory, and a proxy that makes faults.
//!
//! Invariant: they listen on the loopback interface only and end with the test's process; a service that is not installed fails the test.

#![allow(dead_code, reason = "every test crate uses some of them")]

pub mod certificates;
mod group;
pub mod postgres;
pub mod proxy;
pub mod rabbitmq;
pub mod s3;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

pub use group::{Group, first_line};

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of the loopback interface");
    listener.local_addr().expect("bound").port()
}

/// A program of the tests' Python environment.
pub fn python(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/tests-venv/bin").join(name);
    assert!(path.exists(), "{} is missing: run tests/setup", path.display());
    path
}

/// Waits until `ready`, and fails with `what` after `bound`.
pub fn wait_until(what: &str, bound: Duration, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < bound, "{what}: not within {bound:?}");
        sleep(Duration::from_millis(20));
    }
}

/// Whether somebody accepts connections there.
pub fn listens(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}
