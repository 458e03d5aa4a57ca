//! The communicator of a rank that is alone: every collective is done as soon as it is started.
//!
//! Invariant: no data is touched; sizes are checked as among several ranks, so that a mistake does not wait for a second one.

use std::sync::{Mutex, PoisonError};

use super::{Comm, CommError, Partials};

/// The only rank's end.
#[derive(Debug, Default)]
pub struct SoloComm {
    aborted: Mutex<Option<String>>,
}

impl SoloComm {
    fn require(&self, op: &'static str, holds: bool, expected: &str, got: String) -> Result<(), CommError> {
        let aborted = self.aborted.lock().unwrap_or_else(PoisonError::into_inner);
        match &*aborted {
            Some(reason) => Err(CommError::Aborted { rank: 0, reason: reason.clone() }),
            None if holds => Ok(()),
            None => Err(CommError::Mismatch { op, rank: 0, expected: expected.to_owned(), got }),
        }
    }

    fn check_counts(&self, op: &'static str, counts: &[usize]) -> Result<(), CommError> {
        self.require(op, counts.len() == 1, "one count", format!("{counts:?}"))
    }
}

impl<M: Send, S> Comm<M, S> for SoloComm {
    type Pending<const N: usize> = [M; N];
    type Exchange<const N: usize> = ([M; N], [M; N]);

    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather<const N: usize>(&self, rows: [M; N], counts: &[usize]) -> Result<[M; N], CommError> {
        self.check_counts("all-gather", counts)?;
        Ok(rows)
    }

    /// What is sent is what is received: the matrices change places.
    fn all_to_all<const N: usize>(
        &self,
        send: [M; N],
        send_counts: &[usize],
        receive: [M; N],
        receive_counts: &[usize],
    ) -> Result<([M; N], [M; N]), CommError> {
        let op = "all-to-all";
        self.check_counts(op, send_counts)?;
        let got = format!("{receive_counts:?}");
        self.require(op, send_counts == receive_counts, &format!("{send_counts:?} rows from itself"), got)?;
        Ok((receive, send))
    }

    fn finish_all_to_all<const N: usize>(&self, exchange: ([M; N], [M; N])) -> Result<([M; N], [M; N]), CommError> {
        Ok(exchange)
    }

    fn finish<const N: usize>(&self, pending: [M; N]) -> Result<[M; N], CommError> {
        Ok(pending)
    }

    fn all_gather_partials(&self, _: Partials<'_, M, S>, counts: &[usize]) -> Result<(), CommError> {
        self.check_counts("all-gather of partial results", counts)
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        self.require("broadcast", root == 0, "a root below 1", root.to_string())?;
        Ok(value)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.require("barrier", true, "", String::new())
    }

    fn come_further(&self) {}

    fn check(&self) -> Result<(), CommError> {
        self.require("check", true, "", String::new())
    }

    fn abort(&self, reason: &str) {
        self.aborted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A communicator over plain vectors.
    fn alone() -> impl Comm<Vec<f32>, ()> {
        SoloComm::default()
    }

    #[test]
    fn what_is_brought_is_what_comes() {
        let comm = alone();
        assert_eq!(comm.all_gather([vec![1.0]], &[1]).and_then(|rows| comm.finish(rows)).unwrap(), [[1.0]]);
        let exchange = comm.rotate([vec![2.0]], 1, [vec![0.0]], 1).unwrap();
        assert_eq!(comm.finish_all_to_all(exchange).unwrap().1, [[2.0]]);
        let exchange = comm.all_to_all([vec![3.0]], &[1], [vec![0.0]], &[1]).unwrap();
        assert_eq!(comm.finish_all_to_all(exchange).unwrap().1, [[3.0]]);
        assert_eq!(comm.broadcast(0, 7).unwrap(), 7);
    }

    #[test]
    fn mistakes_are_refused_and_the_first_reason_of_an_abort_is_kept() {
        let comm = alone();
        assert!(matches!(comm.all_gather([vec![]], &[1, 1]), Err(CommError::Mismatch { .. })));
        assert!(matches!(comm.all_to_all([vec![]], &[1], [vec![]], &[2]), Err(CommError::Mismatch { .. })));
        assert!(matches!(comm.broadcast(1, 0), Err(CommError::Mismatch { .. })));
        comm.abort("first");
        comm.abort("second");
        assert!(matches!(comm.barrier(), Err(CommError::Aborted { reason, .. }) if reason == "first"));
    }
}
