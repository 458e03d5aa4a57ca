//! Which files have stopped changing, and which of them were taken already.
//!
//! Invariant: some bytes a file, whatever its name; what has gone from the place is forgotten after the next whole look.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use super::listing::Seen;

/// What is remembered between looks.
#[derive(Debug, Default)]
pub(super) struct Settling {
    round: u32,
    files: HashMap<u64, File>,
}

#[derive(Debug)]
struct File {
    version: u64,
    since: Instant,
    taken: bool,
    round: u32,
}

impl Settling {
    /// A look begins.
    pub fn begin(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    /// The look came to its end: what was not seen in it is gone.
    pub fn end(&mut self) {
        let round = self.round;
        self.files.retain(|_, file| file.round == round);
    }

    /// Whether the file has been the same for `settle`, over two looks at least, and is not taken yet.
    pub fn is_settled(&mut self, seen: &Seen, settle: Duration, now: Instant) -> bool {
        let (round, version) = (self.round, hash(&(&seen.version, seen.size)));
        let fresh = || File { version, since: now, taken: false, round };
        let file = self.files.entry(hash(&seen.uri)).or_insert_with(fresh);
        if file.version != version {
            *file = fresh();
        }
        let is_first = file.since == now;
        file.round = round;
        !file.taken && !is_first && now.duration_since(file.since) >= settle
    }

    /// Its job is in the inbox, or its rejection is written.
    pub fn taken(&mut self, seen: &Seen) {
        if let Some(file) = self.files.get_mut(&hash(&seen.uri)) {
            file.taken = true;
        }
    }
}

/// Two names that hash alike would share an entry, and so be taken later; they would still both be taken after a restart.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(version: &str) -> Seen {
        Seen { uri: "file:///a".to_owned(), version: version.to_owned(), etag: None, size: 1 }
    }

    #[test]
    fn a_file_is_taken_once_when_it_has_been_still() {
        let (mut settling, start, settle) = (Settling::default(), Instant::now(), Duration::from_secs(10));
        let mut look = |version: &str, after: u64, take: bool| {
            settling.begin();
            let settled = settling.is_settled(&seen(version), settle, start + Duration::from_secs(after));
            if settled && take {
                settling.taken(&seen(version));
            }
            settling.end();
            settled
        };
        assert!(!look("1", 0, true), "seen for the first time");
        assert!(!look("1", 9, true));
        assert!(!look("2", 10, true), "it has changed");
        assert!(look("2", 20, false), "still, and the commit failed");
        assert!(look("2", 21, true));
        assert!(!look("2", 40, true), "taken");
        assert!(!look("3", 41, true));
        assert!(look("3", 60, true), "a new version is a new file");
    }
}
