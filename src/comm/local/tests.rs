//! The communicator between threads passes the conformance suite of communicators.

use std::time::Duration;

use super::LocalComm;
use crate::backend::cpu::{Matrix, Scores};
use crate::comm::conformance::{self, Ranks};
use crate::comm::{Comm, CommError};

/// Ranks of this process, whichever way their ends come to be.
pub(in crate::comm) struct Ends<F>(pub F);

impl<F: Fn(usize, Duration) -> Vec<LocalComm> + Sync> Ranks for Ends<F> {
    type M = Matrix;
    type S = Scores;
    type C = LocalComm;

    fn group(&self, size: usize, deadline: Duration) -> Vec<LocalComm> {
        (self.0)(size, deadline)
    }
    fn matrix(&self, _: &LocalComm, rows: usize, cols: usize, values: &[f32]) -> Matrix {
        Matrix::from_vec(rows, cols, values.to_vec())
    }
    fn scores(&self, _: &LocalComm, rows: usize, cols: usize, values: &[f32]) -> Scores {
        Scores::from_vec(rows, cols, values.to_vec())
    }
    fn matrix_values(&self, _: &LocalComm, matrix: &Matrix) -> Vec<f32> {
        matrix.data().to_vec()
    }
    fn scores_values(&self, _: &LocalComm, scores: &Scores) -> Vec<f32> {
        scores.data().to_vec()
    }
    fn settle(&self, _: &LocalComm) -> Result<(), CommError> {
        Ok(())
    }
}

macro_rules! on_threads {
    ($($test:ident: $needed:literal,)*) => {
        $(#[test] fn $test() { conformance::$test(&Ends(LocalComm::group)); })*
    };
}
conformance::with_functions!(on_threads);

#[test]
fn every_rank_of_a_round_that_disagrees_is_told_what_the_other_came_with() {
    let mut ends = LocalComm::group(3, conformance::PATIENT).into_iter();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .zip(&mut ends)
            .map(|(rank, comm)| {
                scope.spawn(move || if rank == 1 { comm.barrier() } else { comm.broadcast(0, 7).map(drop) })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let Err(CommError::Mismatch { expected, got, .. }) = outcome else { panic!("rank {rank}: {outcome:?}") };
        let (own, other) = if rank == 1 { ("barrier", "broadcast from 0") } else { ("broadcast from 0", "barrier") };
        assert_eq!((expected.as_str(), got.as_str()), (own, other), "rank {rank}");
    }
}
