//! What lives in device memory: activations and weights in bf16, scores in f32, chosen rows in i32; all row-major.
//!
//! Invariant: a value knows its shape, and its piece of memory is at least as large.

use std::ops::Range;
use std::sync::Arc;

use super::arena::{Arena, Piece};
use crate::BackendError;

/// Activations, keys or values: bf16, or kept keys and values in FP8.
pub struct CudaMatrix {
    pub(super) piece: Piece,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Of a matrix in FP8, whose elements have a byte.
    pub(super) fp8: Option<Fp8Scales>,
}

/// Scales of a matrix in FP8, exponents of a byte `[heads, rows]`; its codes are `[heads, rows, head_dim]`. Element = code * scale, see kernels/fp8.cuh.
pub(super) struct Fp8Scales {
    pub(super) piece: Piece,
    pub(super) heads: usize,
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
        Ok(Self { piece: arena.take(op, rows * cols * 2)?, rows, cols, fp8: None })
    }
    /// A matrix in FP8, `heads` scales a row.
    pub(super) fn in_fp8(
        arena: &Arc<Arena>,
        op: &'static str,
        rows: usize,
        cols: usize,
        heads: usize,
    ) -> Result<Self, BackendError> {
        let scales = Fp8Scales { piece: arena.take(op, rows * heads)?, heads };
        Ok(Self { piece: arena.take(op, rows * cols)?, rows, cols, fp8: Some(scales) })
    }
    /// Address of a row of a matrix in bf16.
    pub(super) fn row(&self, row: usize) -> u64 {
        debug_assert!(self.fp8.is_none());
        self.piece.address() + (row * self.cols * 2) as u64
    }
    /// Shape, and bf16.
    pub(super) fn need(&self, op: &'static str, what: &str, rows: usize, cols: usize) -> Result<(), BackendError> {
        require(op, self.fp8.is_none(), &format!("{what} in bf16"), "FP8")?;
        self.need_either(op, what, rows, cols)
    }
    /// Shape alone: keys and values that are kept may be in FP8.
    pub(super) fn need_either(
        &self,
        op: &'static str,
        what: &str,
        rows: usize,
        cols: usize,
    ) -> Result<(), BackendError> {
        need(op, what, (rows, cols), (self.rows, self.cols))
    }
}

impl Fp8Scales {
    /// Address of a matrix's scales, 0 of a matrix in bf16.
    pub(super) fn address_of(matrix: &CudaMatrix) -> u64 {
        matrix.fp8.as_ref().map_or(0, |scales| scales.piece.address())
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
    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }
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
