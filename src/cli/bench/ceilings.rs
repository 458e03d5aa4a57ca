//! What the device can do at best: copies within its memory, weights that are read for one row, and the products of the model's layers by themselves.
//!
//! Invariant: measured in the same process as what is compared with them.

use serde_json::json;

use super::Options;
use super::report::{Row, median, rounded};
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, BackendError, Head};
use crate::model::ModelSpec;

/// Rows of the products, as many as keep any device busy.
const ROWS: usize = 16_384;
/// Elements of a row of the copied matrix.
const COPY_COLS: usize = 8192;
const WARM_UP: usize = 3;
const REPEATS: usize = 11;

/// GB/s of a copy and of weights, and TFLOP/s of each product.
pub(super) fn measure(cuda: &Cuda, options: &Options) -> Result<Row, BackendError> {
    let spec = options.shape.spec();
    let mut row = Row::new();
    row.insert("what".to_owned(), json!("ceilings"));
    row.insert("shape".to_owned(), json!(options.shape.as_str()));
    row.insert("device".to_owned(), json!(cuda.device_name()));
    row.insert("head_width".to_owned(), json!(options.head_width));
    row.insert("query".to_owned(), json!(options.query));
    row.insert("copy_gb_s".to_owned(), rounded(copy(cuda)?, 0));
    row.insert("weights_gb_s".to_owned(), rounded(head(cuda, &spec)?, 0));
    let products = [
        ("qkv_tflops", spec.shape.qkv_width(), spec.hidden),
        ("o_tflops", spec.hidden, spec.shape.q_width()),
        ("gate_up_tflops", 2 * spec.intermediate, spec.hidden),
        ("down_tflops", spec.hidden, spec.intermediate),
    ];
    for (name, width, inner) in products {
        row.insert(name.to_owned(), rounded(product(cuda, width, inner)?, 0));
    }
    Ok(row)
}

fn copy(cuda: &Cuda) -> Result<f64, BackendError> {
    let from = cuda.random_matrix(1, 1.0, ROWS, COPY_COLS)?;
    let mut to = cuda.matrix(ROWS, COPY_COLS)?;
    let times = cuda.time(WARM_UP, REPEATS, || cuda.copy_matrix(&from, &mut to))?;
    // Read and written.
    Ok(2.0 * (ROWS * COPY_COLS * 2) as f64 / milliseconds(times) / 1e6)
}

/// GB/s of weights, where one row is all they are read for: the language-model head, which no cache holds.
fn head(cuda: &Cuda, spec: &ModelSpec) -> Result<f64, BackendError> {
    let (x, norm) = (cuda.random_matrix(1, 1.0, 1, spec.hidden)?, cuda.random_weight(2, 1.0, 1, spec.hidden)?);
    let weights = cuda.random_weight(3, 1.0, spec.vocab, spec.hidden)?;
    let head = Head { norm: &norm, epsilon: spec.epsilon, weights: &weights };
    let mut out = cuda.scores(1, spec.vocab)?;
    let times = cuda.time(WARM_UP, REPEATS, || cuda.logits(1, &x, &head, 0..spec.vocab, &mut out, 0))?;
    Ok((spec.vocab * spec.hidden * 2) as f64 / milliseconds(times) / 1e6)
}

fn product(cuda: &Cuda, width: usize, inner: usize) -> Result<f64, BackendError> {
    let x = cuda.random_matrix(1, 1.0, ROWS, inner)?;
    let w = cuda.random_weight(2, 1.0, width, inner)?;
    let mut out = cuda.matrix(ROWS, width)?;
    let times = cuda.time(WARM_UP, REPEATS, || cuda.linear(ROWS, &x, &w, None, false, &mut out))?;
    Ok(2.0 * (ROWS * width * inner) as f64 / milliseconds(times) / 1e9)
}

/// Median of what the device says.
pub(super) fn milliseconds(times: Vec<f32>) -> f64 {
    median(times.into_iter().map(f64::from).collect())
}
