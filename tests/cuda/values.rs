//! Matrices of bf16 values on the host, and the rule by which a result is judged.

use apbd::backend::Backend;
use apbd::backend::cuda::{Cuda, CudaMatrix, CudaScores, CudaWeight};
use apbd::backend::{DType, WeightView};
use half::bf16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A matrix whose elements are bf16 values, held as f64.
#[derive(Clone)]
pub struct Values {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f64>,
}

/// To the nearest bf16.
pub fn rounded(value: f64) -> f64 {
    f64::from(bf16::from_f64(value).to_f32())
}

/// How exactly a computation is done: as it is, or with every step in bf16.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Steps {
    Exact,
    Bf16,
}

impl Steps {
    /// A step's result.
    pub fn of(self, value: f64) -> f64 {
        if self == Self::Exact { value } else { rounded(value) }
    }
}

impl Values {
    pub fn random(seed: u64, rows: usize, cols: usize, scale: f64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let data = (0..rows * cols).map(|_| rounded(scale * random.random_range(-1.0..1.0))).collect();
        Self { rows, cols, data }
    }

    pub fn from_fn(rows: usize, cols: usize, mut of: impl FnMut(usize, usize) -> f64) -> Self {
        let data =
            (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).map(|(row, col)| of(row, col)).collect();
        Self { rows, cols, data }
    }

    pub fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..(row + 1) * self.cols]
    }

    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.cols + col]
    }

    fn bits(&self) -> Vec<u16> {
        self.data.iter().map(|value| bf16::from_f64(*value).to_bits()).collect()
    }

    pub fn matrix(&self, cuda: &Cuda) -> CudaMatrix {
        cuda.matrix_from(self.rows, self.cols, &self.bits()).unwrap()
    }

    pub fn weight(&self, cuda: &Cuda) -> CudaWeight {
        let bytes: Vec<u8> = self.bits().into_iter().flat_map(u16::to_le_bytes).collect();
        cuda.weight(WeightView { rows: self.rows, cols: self.cols, dtype: DType::Bf16, bytes: &bytes }).unwrap()
    }

    /// What a matrix holds; elements that are not finite are allowed.
    pub fn read(cuda: &Cuda, matrix: &CudaMatrix, rows: usize, cols: usize) -> Self {
        let bits = cuda.read_matrix(matrix).unwrap();
        assert_eq!(bits.len(), rows * cols);
        Self { rows, cols, data: bits.into_iter().map(|bits| f64::from(bf16::from_bits(bits).to_f32())).collect() }
    }

    pub fn read_scores(cuda: &Cuda, scores: &CudaScores, rows: usize, cols: usize) -> Self {
        let values = cuda.read_scores(scores).unwrap();
        assert_eq!(values.len(), rows * cols);
        Self { rows, cols, data: values.into_iter().map(f64::from).collect() }
    }

    /// The first `rows` rows.
    pub fn first(&self, rows: usize) -> Self {
        Self { rows, cols: self.cols, data: self.data[..rows * self.cols].to_vec() }
    }
}

/// A matrix full of NaN.
pub fn poisoned(cuda: &Cuda, rows: usize, cols: usize) -> CudaMatrix {
    let mut matrix = cuda.matrix(rows, cols).unwrap();
    cuda.poison(&mut matrix).unwrap();
    matrix
}

/// Scores full of NaN.
pub fn poisoned_scores(cuda: &Cuda, rows: usize, cols: usize) -> CudaScores {
    let mut scores = cuda.scores(rows, cols).unwrap();
    cuda.poison_scores(&mut scores).unwrap();
    scores
}

/// The error against the exact result is at most twice that of the same in bf16, plus `allowed`.
pub fn judge(case: &str, got: &Values, of: impl Fn(Steps) -> Values, allowed: f64) {
    let (exact, naive) = (of(Steps::Exact), of(Steps::Bf16));
    assert_eq!((got.rows, got.cols), (exact.rows, exact.cols), "{case}");
    let error = |of: &Values| of.data.iter().zip(&exact.data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(got.data.iter().all(|value| value.is_finite()), "{case}: not finite");
    let (mine, plain) = (error(got), error(&naive));
    assert!(mine <= 2.0 * plain + allowed, "{case}: error {mine:.3e}, bf16 has {plain:.3e}");
}

/// `x wᵀ`, rounded once.
pub fn product(x: &Values, w: &Values, steps: Steps) -> Values {
    assert_eq!(x.cols, w.cols);
    Values::from_fn(x.rows, w.rows, |i, j| steps.of(x.row(i).iter().zip(w.row(j)).map(|(a, b)| a * b).sum()))
}
