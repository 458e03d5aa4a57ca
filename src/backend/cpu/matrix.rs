//! What the CPU computes with: dense row-major f32 matrices.
//!
//! Invariant: `data.len() == rows * cols`.

use crate::BackendError;

/// Activations, keys, values: `[rows, cols]`, row-major, one row a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

/// Scores or log-sum-exps: `[rows, cols]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores(Matrix);

/// Row numbers chosen for each KV head: `[kv_heads, k]`, ascending in each row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    chosen: Vec<Vec<u32>>,
}

impl Matrix {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// A matrix of zeros, or an error where there is no memory for it.
    pub(super) fn allocate(op: &'static str, rows: usize, cols: usize) -> Result<Self, BackendError> {
        let length = rows.saturating_mul(cols);
        let mut data = Vec::new();
        data.try_reserve_exact(length)
            .map_err(|_| BackendError::OutOfMemory { op, bytes: length.saturating_mul(size_of::<f32>()) })?;
        data.resize(length, 0.0);
        Ok(Self { rows, cols, data })
    }

    /// A matrix with these elements.
    ///
    /// # Panics
    /// If `data` has not `rows * cols` elements.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self { rows, cols, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, row after row.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements, row after row.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    /// One row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.cols..(row + 1) * self.cols]
    }
}

impl Scores {
    /// Scores of zero.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self(Matrix::zeros(rows, cols))
    }

    pub(super) fn allocate(op: &'static str, rows: usize, cols: usize) -> Result<Self, BackendError> {
        Matrix::allocate(op, rows, cols).map(Self)
    }

    /// Scores with these elements.
    ///
    /// # Panics
    /// If `data` has not `rows * cols` elements.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        Self(Matrix::from_vec(rows, cols, data))
    }
}

impl std::ops::Deref for Scores {
    type Target = Matrix;
    fn deref(&self) -> &Matrix {
        &self.0
    }
}

impl std::ops::DerefMut for Scores {
    fn deref_mut(&mut self) -> &mut Matrix {
        &mut self.0
    }
}

impl Rows {
    pub(super) fn new(chosen: Vec<Vec<u32>>) -> Self {
        Self { chosen }
    }

    /// What each KV head chose, ascending.
    pub fn chosen(&self) -> &[Vec<u32>] {
        &self.chosen
    }
}
