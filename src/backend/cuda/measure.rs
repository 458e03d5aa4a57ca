//! What tests and benchmarks need beyond the operations: host data in and out, random data, times of the device itself.
//!
//! Invariant: whatever returns host data has waited for the device.
#![allow(unsafe_code)]

use super::Cuda;
use super::driver::{Event, parameters};
use super::matrix::{CudaMatrix, CudaRows, CudaScores, CudaWeight, require};
use crate::{Backend, BackendError};

impl Cuda {
    /// A matrix of the given bf16 values (their bits), row-major.
    pub fn matrix_from(&self, rows: usize, cols: usize, bits: &[u16]) -> Result<CudaMatrix, BackendError> {
        require("matrix_from", bits.len() == rows * cols, &format!("{} elements", rows * cols), bits.len())?;
        let matrix = self.matrix(rows, cols)?;
        // SAFETY: (1) checked above.
        unsafe { self.stream.upload("matrix_from", bytemuck::cast_slice(bits), matrix.row(0)) }?;
        Ok(matrix)
    }

    /// The matrix's elements as bf16 bits, row-major.
    pub fn read_matrix(&self, matrix: &CudaMatrix) -> Result<Vec<u16>, BackendError> {
        let mut bits = vec![0u16; matrix.rows * matrix.cols];
        // SAFETY: (1) the matrix has as many elements.
        unsafe { self.stream.download("read_matrix", matrix.row(0), bytemuck::cast_slice_mut(&mut bits)) }?;
        Ok(bits)
    }

    /// The scores, row-major.
    pub fn read_scores(&self, scores: &CudaScores) -> Result<Vec<f32>, BackendError> {
        let mut values = vec![0f32; scores.rows * scores.cols];
        // SAFETY: (1) the matrix has as many elements.
        unsafe { self.stream.download("read_scores", scores.row(0), bytemuck::cast_slice_mut(&mut values)) }?;
        Ok(values)
    }

    /// One row of them.
    pub(super) fn read_score_row(&self, scores: &CudaScores, row: usize) -> Result<Vec<f32>, BackendError> {
        let mut values = vec![0f32; scores.cols];
        // SAFETY: (1) a row has as many elements.
        unsafe { self.stream.download("read_scores", scores.row(row), bytemuck::cast_slice_mut(&mut values)) }?;
        Ok(values)
    }

    /// The chosen rows, `[heads, k]`.
    pub fn read_rows(&self, rows: &CudaRows) -> Result<Vec<i32>, BackendError> {
        let mut values = vec![0i32; rows.heads * rows.k];
        // SAFETY: (1) the piece has as many elements.
        unsafe { self.stream.download("read_rows", rows.piece.address(), bytemuck::cast_slice_mut(&mut values)) }?;
        Ok(values)
    }

    /// Fills a matrix with the byte `0xff`, which is NaN in every element.
    pub fn poison(&self, matrix: &mut CudaMatrix) -> Result<(), BackendError> {
        // SAFETY: (1) the matrix's own memory.
        unsafe { self.stream.fill("poison", matrix.row(0), 0xff, matrix.rows * matrix.cols * 2) }
    }

    /// As [`Cuda::poison`], for scores.
    pub fn poison_scores(&self, scores: &mut CudaScores) -> Result<(), BackendError> {
        // SAFETY: (1) the matrix's own memory.
        unsafe { self.stream.fill("poison", scores.row(0), 0xff, scores.rows * scores.cols * 4) }
    }

    /// A matrix uniform in `[-scale, scale)`, the same for the same seed.
    pub fn random_matrix(&self, seed: u64, scale: f32, rows: usize, cols: usize) -> Result<CudaMatrix, BackendError> {
        let matrix = self.matrix(rows, cols)?;
        self.fill_random(seed, scale, rows * cols, matrix.row(0))?;
        Ok(matrix)
    }

    /// A weight uniform in `[-scale, scale)`, the same for the same seed.
    pub fn random_weight(&self, seed: u64, scale: f32, rows: usize, cols: usize) -> Result<CudaWeight, BackendError> {
        let piece = self.arena.take("random_weight", rows * cols * 2)?;
        self.fill_random(seed, scale, rows * cols, piece.address())?;
        Ok(CudaWeight { piece, rows, cols })
    }

    fn fill_random(&self, seed: u64, scale: f32, count: usize, at: u64) -> Result<(), BackendError> {
        let threads = 256;
        let (grid, count) = ((count.div_ceil(threads).min(64 << 10), 1, 1), count as u64);
        // SAFETY: (1) parameters as in random.cu; (2) the caller's memory has `count` elements.
        unsafe { self.stream.launch(&self.functions.random_bf16, grid, threads, parameters![seed, scale, count, at]) }
    }

    /// Milliseconds on the device of each of `repeats` runs of `work`, after `warm_up` runs that do not count.
    pub fn time(
        &self,
        warm_up: usize,
        repeats: usize,
        mut work: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<Vec<f32>, BackendError> {
        for _ in 0..warm_up {
            work()?;
        }
        let events = (0..=repeats).map(|_| Event::new(&self.context)).collect::<Result<Vec<_>, _>>()?;
        events[0].record(&self.stream)?;
        for event in &events[1..] {
            work()?;
            event.record(&self.stream)?;
        }
        events[repeats].synchronize()?;
        events.windows(2).map(|pair| pair[0].milliseconds_to(&pair[1])).collect()
    }

    /// Copies one matrix to another of the same shape; what a device-to-device copy takes is the bandwidth there is.
    pub fn copy_matrix(&self, from: &CudaMatrix, to: &mut CudaMatrix) -> Result<(), BackendError> {
        self.copy_rows(from, 0, from.rows, to, 0)
    }
}
