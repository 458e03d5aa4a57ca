//! The communicator between threads passes the conformance suite of communicators.

use std::time::Duration;

use super::LocalComm;
use crate::backend::cpu::{Matrix, Scores};
use crate::comm::conformance::{self, Ranks};

struct Threads;

impl Ranks for Threads {
    type M = Matrix;
    type S = Scores;
    type C = LocalComm;

    fn group(&self, size: usize, deadline: Duration) -> Vec<LocalComm> {
        LocalComm::group(size, deadline)
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
}

conformance::suite!(Threads);
