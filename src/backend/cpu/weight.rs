//! Weights as the CPU computes with them: f32, whatever the file holds.
//!
//! Invariant: every element is finite.

use half::{bf16, f16};

use super::matrix::Matrix;
use crate::backend::{BackendError, DType, WeightView};

/// The weights of `views`, stacked by rows, as f32.
pub(super) fn load(views: &[WeightView<'_>]) -> Result<Matrix, BackendError> {
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
    Ok(Matrix::from_vec(rows, cols, data))
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
