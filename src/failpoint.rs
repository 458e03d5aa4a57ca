//! Named places where a test can make the process die, as a power cut would.
//!
//! `APBD_FAILPOINT=name` or `name:N` ends the process the first or the `N`th time it comes to that place.
//!
//! Invariant: not in release builds.

/// The process may end here.
#[cfg(debug_assertions)]
pub fn reach(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static ARMED: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let armed = std::env::var("APBD_FAILPOINT").ok()?;
        let (name, count) = armed.split_once(':').unwrap_or((&armed, "1"));
        Some((name.to_owned(), AtomicU64::new(count.parse().unwrap_or(1))))
    });
    if let Some((armed, left)) = &*ARMED
        && armed == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        std::process::abort();
    }
}

/// The process may end here, in builds for tests.
#[cfg(not(debug_assertions))]
pub fn reach(_name: &str) {}
