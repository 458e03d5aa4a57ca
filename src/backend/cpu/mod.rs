//! The CPU backend: f32, a pool of threads per rank, matrix products by the `gemm` crate, blocked attention.
//!
//! Invariant: whatever the number of threads, results are the same to the bit; no operation reads its output's old contents
//! unless it accumulates.

mod matrix;

pub use matrix::{Matrix, Rows, Scores};
