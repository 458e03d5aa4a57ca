//! What lives in device memory: activations and weights in bf16, scores in f32, chosen rows in i32; all row-major.
//!
//! Invariant: a value knows its shape, and its piece of memory is at least as large.

use std::ops::Range;
use std::sync::Arc;

use super::arena::{Arena, Piece};
use crate::backend::BackendError;

/// Activations, keys or values, bf16.
pub struct CudaMatrix {
    pub(super) piece: Piece,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Scores or log-sum-exps, f32.
pub struct CudaScores {
    pub(super) piece: Piece,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Score columns chosen by top-k, i32: `[heads, k]`.
pub struct CudaRows {
    pub(super) piece: Piece,
    pub(super) heads: usize,
    pub(super) k: usize,
    /// Score columns that can be among them.
    pub(super) bounds: Range<usize>,
}

/// A weight matrix, bf16: `[rows, cols]`, rows being output features.
pub struct CudaWeight {
    pub(super) piece: Piece,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl CudaMatrix {
    pub(super) fn new(arena: &Arc<Arena>, op: &'static str, rows: usize, cols: usize) -> Result<Self, BackendError> {
        Ok(Self { piece: arena.take(op, rows * cols * 2)?, rows, cols })
    }
    /// Address of a row.
    pub(super) fn row(&self, row: usize) -> u64 {
        self.piece.address() + (row * self.cols * 2) as u64
    }
    pub(super) fn need(&self, op: &'static str, what: &str, rows: usize, cols: usize) -> Result<(), BackendError> {
        need(op, what, (rows, cols), (self.rows, self.cols))
    }
}

impl CudaScores {
    pub(super) fn new(arena: &Arc<Arena>, op: &'static str, rows: usize, cols: usize) -> Result<Self, BackendError> {
        Ok(Self { piece: arena.take(op, rows * cols * 4)?, rows, cols })
    }
    /// Address of a row.
    pub(super) fn row(&self, row: usize) -> u64 {
        self.piece.address() + (row * self.cols * 4) as u64
    }
}

impl CudaWeight {
    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Rows and columns exactly.
    pub(super) fn need(&self, op: &'static str, what: &str, rows: usize, cols: usize) -> Result<(), BackendError> {
        let expected = format!("{what} [{rows}, {cols}]");
        require(op, (self.rows, self.cols) == (rows, cols), &expected, format_args!("[{}, {}]", self.rows, self.cols))
    }
}

/// Columns exactly, rows at least.
pub(super) fn need(
    op: &'static str,
    what: &str,
    (rows, cols): (usize, usize),
    got: (usize, usize),
) -> Result<(), BackendError> {
    if got.0 >= rows && got.1 == cols {
        return Ok(());
    }
    Err(BackendError::Shape {
        op,
        expected: format!("{what} [at least {rows}, {cols}]"),
        got: format!("[{}, {}]", got.0, got.1),
    })
}

/// A condition on numbers that are not a matrix's shape.
pub(super) fn require(
    op: &'static str,
    holds: bool,
    expected: &str,
    got: impl std::fmt::Display,
) -> Result<(), BackendError> {
    if holds {
        return Ok(());
    }
    Err(BackendError::Shape { op, expected: expected.into(), got: got.to_string() })
}
