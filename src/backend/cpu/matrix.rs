//! What the CPU backend computes on: row-major f32 matrices, and weights converted to f32 when they are loaded.
//!
//! Invariant: `data.len() == rows * cols`.

use std::ops::Range;

use half::{bf16, f16};

use crate::backend::{BackendError, DType, WeightView};

/// Activations, keys or values.
#[derive(Debug, Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// Zeros.
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, row by row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements, row by row.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..][..self.cols]
    }

    /// A run of rows.
    pub fn rows_in(&self, rows: Range<usize>) -> &[f32] {
        &self.data[rows.start * self.cols..rows.end * self.cols]
    }

    /// A run of rows.
    pub fn rows_in_mut(&mut self, rows: Range<usize>) -> &mut [f32] {
        &mut self.data[rows.start * self.cols..rows.end * self.cols]
    }

    /// An error unless there are at least `rows` rows of exactly `cols` columns.
    pub(super) fn expect(&self, op: &'static str, rows: usize, cols: usize) -> Result<(), BackendError> {
        if self.rows >= rows && self.cols == cols {
            return Ok(());
        }
        let got = format!("[{}, {}]", self.rows, self.cols);
        Err(BackendError::Shape { op, expected: format!("[at least {rows}, {cols}]"), got })
    }
}

/// The weights of `views`, stacked by rows, as f32.
pub(super) fn weight(views: &[WeightView<'_>]) -> Result<Matrix, BackendError> {
    let cols = views.first().map_or(0, |view| view.cols);
    let rows = views.iter().map(|view| view.rows).sum();
    let mut data = Vec::with_capacity(rows * cols);
    for view in views {
        check(view, cols)?;
        let first = data.len();
        match view.dtype {
            DType::F32 => data.extend(view.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            DType::F16 => data.extend(view.bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())),
            DType::Bf16 => data.extend(view.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        }
        if let Some(at) = data[first..].iter().position(|value: &f32| !value.is_finite()) {
            let got = format!("{} at row {}, column {}", data[first + at], at / cols, at % cols);
            return Err(BackendError::Shape { op: "weight", expected: "finite numbers".to_owned(), got });
        }
    }
    Ok(Matrix { rows, cols, data })
}

fn check(view: &WeightView<'_>, cols: usize) -> Result<(), BackendError> {
    let size = match view.dtype {
        DType::F32 => 4,
        DType::F16 | DType::Bf16 => 2,
    };
    let expected = view.rows * view.cols * size;
    if view.cols != cols || view.bytes.len() != expected {
        let expected = format!("[{}, {cols}] in {expected} bytes", view.rows);
        let got = format!("[{}, {}] in {} bytes", view.rows, view.cols, view.bytes.len());
        return Err(BackendError::Shape { op: "weight", expected, got });
    }
    Ok(())
}
