//! Where a document is: `s3://store-alias/bucket/key` or `file:///absolute/path`.
//!
//! An S3 URI names a configured store, never an endpoint or a credential, and its key stands there as it is (no escapes). A file
//! URI is percent-encoded as RFC 8089 has it, so that every file name of the system can be written.
//!
//! Invariant: a parsed URI has no `.` or `..` segment and no control character, so no policy on prefixes can be walked around.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A document as a job names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentRef {
    /// Where it is.
    pub uri: DocumentUri,
    /// Version of the object, where the store keeps versions.
    pub version_id: Option<String>,
    /// Entity tag that the bytes must have; opaque.
    pub etag: Option<String>,
    /// `type/subtype`; absent: found out from the bytes.
    pub media_type: Option<String>,
}

/// Where a document is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DocumentUri {
    /// An object of a configured store.
    S3 {
        /// Alias in the configuration.
        store: String,
        /// Bucket.
        bucket: String,
        /// Key, exactly as the store has it; `a//b`, spaces and any script are fine.
        key: String,
    },
    /// A file of this machine.
    File {
        /// Absolute.
        path: PathBuf,
    },
}

impl DocumentUri {
    /// That of a file; `None` if the path is relative or has a `..` in it.
    pub fn from_path(path: &Path) -> Option<Self> {
        let plain = path.is_absolute() && !has_dot_segment(path.as_os_str().as_bytes());
        plain.then(|| Self::File { path: path.to_owned() })
    }
}

impl FromStr for DocumentUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.chars().any(char::is_control) {
            return Err("has control characters".to_owned());
        }
        let uri = if let Some(rest) = text.strip_prefix("s3://") {
            parse_s3(rest)?
        } else if let Some(rest) = text.strip_prefix("file://") {
            parse_file(rest)?
        } else {
            return Err("expected s3://store/bucket/key or file:///path".to_owned());
        };
        Ok(uri)
    }
}

fn parse_s3(rest: &str) -> Result<DocumentUri, String> {
    let mut parts = rest.splitn(3, '/');
    let (Some(store), Some(bucket), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("expected s3://store/bucket/key".to_owned());
    };
    let plain = |name: &str| {
        let fits = (1..=63).contains(&name.len()) && name != "." && name != "..";
        fits && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    if !plain(store) || !plain(bucket) {
        return Err("store and bucket are names of letters, digits, '-', '_' and '.'".to_owned());
    }
    if key.is_empty() || key.len() > 1024 {
        return Err("the key has 1 to 1024 bytes".to_owned());
    }
    if has_dot_segment(key.as_bytes()) {
        return Err("'.' and '..' are not allowed in a key".to_owned());
    }
    Ok(DocumentUri::S3 { store: store.to_owned(), bucket: bucket.to_owned(), key: key.to_owned() })
}

fn parse_file(rest: &str) -> Result<DocumentUri, String> {
    let bytes = percent_decode(rest).ok_or("a '%' is not followed by two hexadecimal digits")?;
    if bytes.first() != Some(&b'/') {
        return Err("expected file:///path with an absolute path and no host".to_owned());
    }
    if bytes.contains(&0) || has_dot_segment(&bytes) {
        return Err("'.', '..' and NUL are not allowed in a path".to_owned());
    }
    Ok(DocumentUri::File { path: PathBuf::from(OsStr::from_bytes(&bytes)) })
}

fn has_dot_segment(path: &[u8]) -> bool {
    path.split(|byte| *byte == b'/').any(|segment| segment == b"." || segment == b"..")
}

fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    Some(bytes)
}

impl fmt::Display for DocumentUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { store, bucket, key } => write!(f, "s3://{store}/{bucket}/{key}"),
            Self::File { path } => {
                f.write_str("file://")?;
                path.as_os_str().as_bytes().iter().try_for_each(|byte| match byte {
                    b'/' | b'-' | b'_' | b'.' | b'~' => write!(f, "{}", char::from(*byte)),
                    byte if byte.is_ascii_alphanumeric() => write!(f, "{}", char::from(*byte)),
                    byte => write!(f, "%{byte:02X}"),
                })
            }
        }
    }
}

impl TryFrom<String> for DocumentUri {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DocumentUri> for String {
    fn from(uri: DocumentUri) -> String {
        uri.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_read_back_as_they_were() {
        for key in ["a//b", "a b/ü/漢.pdf", "100%", "x?y#z", "..a/b.."] {
            let uri = DocumentUri::S3 { store: "main".into(), bucket: "docs".into(), key: key.into() };
            assert_eq!(uri.to_string().parse(), Ok(uri));
        }
        for name in [&b"/tmp/a b%\xff\xfe.txt"[..], b"/x\ny", "/ü#?".as_bytes()] {
            let uri = DocumentUri::from_path(Path::new(OsStr::from_bytes(name))).unwrap();
            assert_eq!(uri.to_string().parse(), Ok(uri));
        }
    }

    #[test]
    fn nothing_leaves_its_prefix() {
        let refused = [
            "s3://main/docs/a/../b",
            "s3://main/../b",
            "s3://main/docs/",
            "s3://main/docs",
            "s3:///docs/a",
            "s3://a b/docs/a",
            "s3://main/docs/a\nb",
            "file:///a/../b",
            "file:///a/%2e%2e/b",
            "file:///a%2F..%2Fb",
            "file:///a%00b",
            "file://host/a",
            "file:///a%4",
            "file:///a%zz",
            "http://169.254.169.254/",
            "s3://user:secret@host/b/k",
            "/etc/passwd",
            "",
        ];
        for uri in refused {
            assert!(uri.parse::<DocumentUri>().is_err(), "{uri}");
        }
    }
}
