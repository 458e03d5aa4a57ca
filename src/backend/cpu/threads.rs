//! The threads of one rank: the caller's own and a few helpers.
//!
//! Invariant: the calling thread always works too, so a rank of one thread has no helpers and nothing is ever handed over
//! for work that is a single item.

use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::BackendError;

/// A fixed number of threads that share lists of work.
pub(super) struct Threads {
    /// Absent if the caller works alone.
    helpers: Option<ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads, the caller's among them.
    pub(super) fn new(count: usize) -> Result<Self, BackendError> {
        let count = count.max(1);
        let helpers = match count {
            1 => None,
            _ => Some(
                ThreadPoolBuilder::new()
                    .num_threads(count - 1)
                    .thread_name(|i| format!("apbd-cpu-{i}"))
                    .build()
                    .map_err(|error| BackendError::Unavailable(format!("starting {count} threads: {error}")))?,
            ),
        };
        Ok(Self { helpers, count })
    }

    /// Number of threads that work, the caller's among them.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Does every item, the first ones first; long items belong to the front.
    pub(super) fn each<T: Send>(&self, items: Vec<T>, work: impl Fn(T) + Sync) {
        self.each_with(items, || (), |(), item| work(item));
    }

    /// As [`Threads::each`], with something of its own for each thread that takes part.
    pub(super) fn each_with<T: Send, S>(
        &self,
        items: Vec<T>,
        own: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, T) + Sync,
    ) {
        let helping = self.count.min(items.len()).saturating_sub(1);
        let queue = Mutex::new(items.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let take_part = || {
            let mut first = next();
            if first.is_none() {
                return;
            }
            let mut own = own();
            while let Some(item) = first {
                work(&mut own, item);
                first = next();
            }
        };
        match &self.helpers {
            Some(pool) if helping > 0 => pool.in_place_scope(|scope| {
                (0..helping).for_each(|_| scope.spawn(|_| take_part()));
                take_part();
            }),
            _ => take_part(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::Threads;

    #[test]
    fn every_item_is_done_once_whatever_the_number_of_threads() {
        for count in [1, 2, 5] {
            let done: Vec<_> = (0..97).map(|_| AtomicUsize::new(0)).collect();
            Threads::new(count).unwrap().each((0..97).collect(), |i: usize| {
                done[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{count} threads");
        }
    }

    #[test]
    fn a_panic_in_an_item_reaches_the_caller() {
        let threads = Threads::new(3).unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            threads.each(vec![1, 2, 3, 4], |i| assert!(i != 3))
        }));
        assert!(outcome.is_err());
    }
}
