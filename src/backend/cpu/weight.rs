//! Weights, converted to f32 once when they are loaded.
//!
//! Invariant: every element is finite.

use half::{bf16, f16};

use super::check;
use super::matrix::Matrix;
use super::threads::Threads;
use crate::{BackendError, DType, WeightView};

/// Elements converted as one piece of work.
const PIECE: usize = 1 << 16;

/// A matrix of weights: `[output features, input features]`, or one row for a vector.
#[derive(Debug)]
pub struct Weight(Matrix);

impl Weight {
    /// The elements.
    pub fn matrix(&self) -> &Matrix {
        &self.0
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.0.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.0.cols()
    }

    /// The elements of a vector.
    pub(super) fn vector(&self, op: &'static str, length: usize) -> Result<&[f32], BackendError> {
        check(op, self.0.rows() == 1 && self.0.cols() == length, || {
            (format!("a vector of {length}"), format!("[{}, {}]", self.0.rows(), self.0.cols()))
        })?;
        Ok(self.0.data())
    }

    /// Converts matrices of equal width and stacks their rows.
    pub(super) fn load(threads: &Threads, views: &[WeightView<'_>]) -> Result<Self, BackendError> {
        let cols = views.first().map_or(0, |view| view.cols);
        let rows = views.iter().map(|view| view.rows).sum();
        for view in views {
            check_view(view, cols)?;
        }
        let mut matrix = Matrix::allocate("weight", rows, cols)?;
        let mut rest = matrix.data_mut();
        for view in views {
            let (part, others) = rest.split_at_mut(view.rows * cols);
            convert(threads, view, part)?;
            rest = others;
        }
        Ok(Self(matrix))
    }
}

fn check_view(view: &WeightView<'_>, cols: usize) -> Result<(), BackendError> {
    let WeightView { rows, cols: own, dtype, bytes } = *view;
    check("weight", own == cols, || (format!("{cols} columns as in the matrix above"), format!("{own}")))?;
    let wanted = rows.checked_mul(cols).and_then(|n| n.checked_mul(size(dtype)));
    check("weight", wanted == Some(bytes.len()), || {
        (format!("[{rows}, {cols}] elements of {dtype:?}"), format!("{} bytes", bytes.len()))
    })
}

fn size(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::Bf16 => 2,
    }
}

/// Converts a weight in pieces, all threads at it. Of several bad elements the first is named.
fn convert(threads: &Threads, view: &WeightView<'_>, out: &mut [f32]) -> Result<(), BackendError> {
    let bad = std::sync::atomic::AtomicUsize::new(usize::MAX);
    let bytes = view.bytes.chunks(PIECE * size(view.dtype));
    let pieces = out.chunks_mut(PIECE).zip(bytes).enumerate().collect();
    threads.each(pieces, |(piece, (out, bytes)): (usize, (&mut [f32], &[u8]))| {
        convert_piece(view.dtype, bytes, out);
        if let Some(i) = out.iter().position(|x| !x.is_finite()) {
            bad.fetch_min(piece * PIECE + i, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let bad = bad.into_inner();
    check("weight", bad == usize::MAX, || {
        let place = format!("element {bad} (row {}, column {})", bad / view.cols, bad % view.cols);
        ("finite elements".to_owned(), format!("{place} is {}", out[bad]))
    })
}

fn convert_piece(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => {
            let words = bytes.as_chunks::<4>().0;
            out.iter_mut().zip(words).for_each(|(out, &word)| *out = f32::from_le_bytes(word));
        }
        DType::F16 => {
            let words = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(words).for_each(|(out, &word)| *out = f16::from_le_bytes(word).to_f32());
        }
        DType::Bf16 => {
            let words = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(words).for_each(|(out, &word)| *out = bf16::from_le_bytes(word).to_f32());
        }
    }
}
