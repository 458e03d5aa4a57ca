//! Where a store is: `sqlite:PATH` (or a bare path), `postgres://USER@HOST/DATABASE`.
//!
//! Invariant: the only place where such a location is parsed; its text form never shows a password.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::error::StoreError;

/// File of `apbd run` and its companions in the current folder, unless they are told another.
pub const DEFAULT_SQLITE_FILE: &str = "apbd.db";

/// Where a store is.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// A file of this machine.
    Sqlite(PathBuf),
    /// A PostgreSQL database: the whole connection URL.
    Postgres(String),
}

impl Default for StoreUrl {
    fn default() -> Self {
        Self::Sqlite(PathBuf::from(DEFAULT_SQLITE_FILE))
    }
}

impl FromStr for StoreUrl {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let refuse = |reason: &str| StoreError::Url { url: without_password(text), reason: reason.to_owned() };
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        let path = match text.strip_prefix("sqlite:") {
            Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
            None if text.contains("://") => {
                return Err(refuse("expected sqlite:PATH or postgres://USER@HOST/DATABASE"));
            }
            None => text,
        };
        if path.is_empty() || path == ":memory:" {
            return Err(refuse("expected the path of a file; state that is not on disk survives nothing"));
        }
        Ok(Self::Sqlite(Path::new(path).to_owned()))
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(url) => f.write_str(&without_password(url)),
        }
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreUrl({self})")
    }
}

/// `url` without what follows the user's name before `@`, and without its parameters, where a password may stand too.
fn without_password(url: &str) -> String {
    let url = url.split_once('?').map_or(url, |(before, _)| before);
    match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((user, place)) => {
                let name = user.split_once(':').map_or(user, |(name, _)| name);
                format!("{scheme}://{name}@{place}")
            }
            None => url.to_owned(),
        },
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_understood() {
        for (text, path) in [("sqlite:a b.db", "a b.db"), ("sqlite:///x/y.db", "/x/y.db"), ("runs/z.db", "runs/z.db")] {
            assert_eq!(text.parse::<StoreUrl>().unwrap(), StoreUrl::Sqlite(path.into()));
        }
        assert!(matches!("postgresql://u@h/d".parse(), Ok(StoreUrl::Postgres(_))));
        for text in ["", "sqlite:", "sqlite::memory:", "mysql://u@h/d"] {
            assert!(text.parse::<StoreUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        let shown = |text: &str| match text.parse::<StoreUrl>() {
            Ok(url) => format!("{url} {url:?}"),
            Err(error) => format!("{error} {error:?}"),
        };
        let urls = [
            "postgres://app:s3cret@db/x",
            "postgres://app:s3@cret@db/x",
            "postgres://db/x?password=s3cret",
            "mysql://a:s3cret@h/d",
        ];
        for url in urls {
            assert!(!shown(url).contains("cret"), "{}", shown(url));
        }
    }
}
