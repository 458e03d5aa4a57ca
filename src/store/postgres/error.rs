//! Which errors of the database pass by themselves.
//!
//! Invariant: decided by the kind of error and its SQLSTATE, never by its text.

use crate::store::StoreError;

/// Classes of SQLSTATE after which the same call may succeed: connection (08), transaction rolled back by the server (40),
/// resources (53), operator intervention and shutdown (57).
const TRANSIENT_CLASSES: [&str; 4] = ["08", "40", "53", "57"];

/// Lock not available; time limits within a transaction; a server that became a standby.
const TRANSIENT_CODES: [&str; 4] = ["55P03", "25P03", "25P04", "25006"];

/// The error of `operation` at `place`.
pub(super) fn classified(place: &str, operation: &'static str, source: sqlx::Error) -> StoreError {
    let place = place.to_owned();
    match is_transient(&source) {
        true => StoreError::Unavailable { place, operation, source },
        false => StoreError::Refused { place, operation, source },
    }
}

fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => true,
        // What a cut connection leaves of a message.
        sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_transient_code(&code)),
        _ => false,
    }
}

fn is_transient_code(code: &str) -> bool {
    TRANSIENT_CODES.contains(&code) || TRANSIENT_CLASSES.iter().any(|class| code.starts_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_passes_and_a_missing_right_does_not() {
        for code in ["57P01", "57P03", "08006", "40P01", "53300", "55P03", "57014"] {
            assert!(is_transient_code(code), "{code}");
        }
        for code in ["42501", "42P01", "23505", "28P01", "22021"] {
            assert!(!is_transient_code(code), "{code}");
        }
    }
}
