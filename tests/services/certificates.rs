//! An authority and the certificate of a server, made for one test.
//!
//! Invariant: valid for `localhost` alone, for a day, and trusted by nobody who is not told of the authority.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Files in PEM.
pub struct Certificates {
    directory: TempDir,
}

impl Certificates {
    /// Makes them with `openssl`.
    pub fn make() -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let at = directory.path();
        fs::write(at.join("server.ext"), "subjectAltName = DNS:localhost\n").expect("written");
        let key = ["-newkey", "rsa:2048", "-nodes"];
        openssl(
            at,
            &[
                "req",
                "-x509",
                "-days",
                "1",
                "-subj",
                "/CN=authority of a test",
                "-keyout",
                "authority.key",
                "-out",
                "authority.pem",
            ],
            &key,
        );
        openssl(at, &["req", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"], &key);
        let signed_by = ["-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial"];
        openssl(
            at,
            &["x509", "-req", "-days", "1", "-in", "server.csr", "-extfile", "server.ext", "-out", "server.pem"],
            &signed_by,
        );
        Self { directory }
    }

    /// Who vouches for the server.
    pub fn authority(&self) -> PathBuf {
        self.directory.path().join("authority.pem")
    }

    /// The server's certificate.
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("server.pem")
    }

    /// The server's key.
    pub fn key(&self) -> PathBuf {
        self.directory.path().join("server.key")
    }
}

fn openssl(at: &Path, arguments: &[&str], more: &[&str]) {
    let output = Command::new("openssl")
        .args(arguments)
        .args(more)
        .current_dir(at)
        .output()
        .expect("openssl runs: see tests/setup");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
