//! Products with weights: which kernel takes one, and its launch. Few rows are bound by the bandwidth of the weights, many by arithmetic.
//!
//! Invariant: kernels are launched on checked shapes only; what a row of at most [`SKINNY_ROWS`] gives depends neither on the others nor on their number.
#![allow(unsafe_code)]

use super::Cuda;
use super::blas::{Form, Operands};
use super::driver::{Function, parameters};
use super::matrix::{CudaMatrix, CudaWeight, require};
use super::modules::Modules;
use crate::BackendError;

/// Rows that kernels/skinny.cu takes at most.
pub(super) const SKINNY_ROWS: usize = 32;
/// Rows of each of its kernels.
const SKINNY_SIZES: [usize; 3] = [8, 16, 32];
/// Shared memory of its blocks: three stages of 4096 bytes for each of eight warps.
const SKINNY_SHARED_BYTES: usize = 8 * 3 * 4096;
/// Threads of its blocks, and of those of gemv.cu, which have a warp an output.
pub(super) const THREADS: usize = 256;

/// Who takes products of few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProductPath {
    /// The kernels for up to 32 rows.
    #[default]
    Skinny,
    /// The same from two rows on, and one row by a kernel for vectors.
    Vector,
    /// One row by a kernel for vectors, more by cuBLASLt.
    Library,
}

/// What becomes of a product in kernels/skinny.cu.
#[derive(Debug, Clone, Copy)]
pub(super) enum Into {
    /// Rounded, bias and residual added.
    Bf16,
    /// Left as it is.
    F32,
    /// Gate and up joined.
    Swiglu,
}

/// Addresses and shape of a product: `x [rows, cols]`, `w [width, cols]`, `out [rows, width]`. `bias` is 0 for none.
pub(super) struct Product {
    pub rows: usize,
    pub cols: usize,
    pub width: usize,
    pub x: u64,
    pub w: u64,
    /// Elements from a row of `w` to the next.
    pub stride: usize,
    /// Of SwiGLU: rows from those of gate to those of up.
    pub up: usize,
    pub bias: u64,
    pub accumulate: bool,
    pub out: u64,
}

impl Product {
    /// A plain one, with a whole matrix of weights.
    pub fn new((rows, cols, width): (usize, usize, usize), x: u64, w: u64, out: u64) -> Self {
        Self { rows, cols, width, x, w, stride: cols, up: 0, bias: 0, accumulate: false, out }
    }
}

/// The kernels for few rows.
pub(super) struct Skinny {
    bf16: [Function; 3],
    f32: [Function; 3],
    swiglu: [Function; 3],
}

impl Skinny {
    /// Looks them up.
    pub fn new(modules: &Modules) -> Result<Self, BackendError> {
        let function = |name| modules.function("skinny", name, SKINNY_SHARED_BYTES);
        Ok(Self {
            bf16: [function("skinny_8")?, function("skinny_16")?, function("skinny_32")?],
            f32: [function("skinny_f32_8")?, function("skinny_f32_16")?, function("skinny_f32_32")?],
            swiglu: [function("skinny_swiglu_8")?, function("skinny_swiglu_16")?, function("skinny_swiglu_32")?],
        })
    }

    fn kernel(&self, into: Into, rows: usize) -> (&Function, usize) {
        let size = SKINNY_SIZES.iter().position(|size| rows <= *size).expect("no more rows than the largest takes");
        match into {
            Into::Bf16 => (&self.bf16[size], 32),
            Into::F32 => (&self.f32[size], 32),
            Into::Swiglu => (&self.swiglu[size], 16),
        }
    }
}

/// Who takes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taker {
    Vector,
    Skinny,
    Library,
}

impl ProductPath {
    pub(super) fn taker(self, rows: usize) -> Taker {
        match (self, rows) {
            (Self::Vector | Self::Library, 1) => Taker::Vector,
            (Self::Skinny | Self::Vector, ..=SKINNY_ROWS) => Taker::Skinny,
            _ => Taker::Library,
        }
    }
}

impl Cuda {
    pub(super) fn run_linear(
        &self,
        rows: usize,
        x: &CudaMatrix,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        accumulate: bool,
        out: &mut CudaMatrix,
    ) -> Result<(), BackendError> {
        let op = "linear";
        x.need(op, "x", rows, w.cols)?;
        out.need(op, "out", rows, w.rows)?;
        if let Some(bias) = bias {
            bias.need(op, "bias", 1, w.rows)?;
        }
        require(op, w.cols.is_multiple_of(8), "columns a multiple of 8", w.cols)?;
        let bias = bias.map_or(0, |bias| bias.piece.address());
        let (x, weights, out) = (x.row(0), w.piece.address(), out.row(0));
        let product = Product { bias, accumulate, ..Product::new((rows, w.cols, w.rows), x, weights, out) };
        match self.products.taker(rows) {
            Taker::Vector => self.gemv(&product),
            Taker::Skinny => self.skinny(Into::Bf16, &product),
            Taker::Library => {
                let form = Form { bias: bias != 0, accumulate, ..Form::new(rows, w.rows, w.cols) };
                // SAFETY: (1) checked above; matrices are borrowed.
                unsafe { self.blas.multiply(&self.stream, form, Operands { x, w: weights, bias, out }) }
            }
        }
    }

    /// Launches a kernel for few rows; columns are a multiple of 8.
    pub(super) fn skinny(&self, into: Into, product: &Product) -> Result<(), BackendError> {
        let (function, outputs) = self.skinny.kernel(into, product.rows);
        let &Product { rows, cols, width, x, w, stride, up, bias, accumulate, out } = product;
        let grid = (width.div_ceil(outputs), 1, 1);
        let (add, [rows, cols, stride, width, up]) =
            (i32::from(accumulate), [rows, cols, stride, width, up].map(|n| n as i32));
        let parameters = parameters![x, w, bias, add, rows, cols, stride, width, up, out];
        // SAFETY: (1) parameters as in skinny.cu; (2) by the callers' borrows and pieces.
        unsafe { self.stream.launch(function, grid, THREADS, parameters) }
    }

    /// Launches the kernel for one row; columns are a multiple of 8.
    pub(super) fn gemv(&self, product: &Product) -> Result<(), BackendError> {
        let &Product { x, w, bias, out, .. } = product;
        let (add, cols, width) = (i32::from(product.accumulate), product.cols as i32, product.width as i32);
        let grid = ((product.width * 32).div_ceil(THREADS), 1, 1);
        let parameters = parameters![x, w, bias, add, cols, width, out];
        // SAFETY: (1) parameters as in gemv.cu; (2) by the callers' borrows and pieces.
        unsafe { self.stream.launch(&self.functions.gemv, grid, THREADS, parameters) }
    }

    /// A plain product, left in f32; columns are a multiple of 8.
    pub(super) fn wide_product(&self, product: &Product) -> Result<(), BackendError> {
        let &Product { rows, cols, width, x, w, out, .. } = product;
        match self.products.taker(rows) {
            Taker::Skinny => self.skinny(Into::F32, product),
            Taker::Vector => {
                let (cols_word, width_word) = (cols as i32, width as i32);
                let grid = ((width * 32).div_ceil(THREADS), 1, 1);
                let parameters = parameters![x, w, cols_word, width_word, out];
                // SAFETY: (1) parameters as in gemv.cu; (2) by the caller's borrows and pieces.
                unsafe { self.stream.launch(&self.functions.gemv_f32, grid, THREADS, parameters) }
            }
            Taker::Library => {
                let form = Form { wide: true, ..Form::new(rows, width, cols) };
                // SAFETY: (1) by the caller's borrows and pieces.
                unsafe { self.blas.multiply(&self.stream, form, Operands { x, w, bias: 0, out }) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_few_rows_go_where_they_are_told() {
        let takers = |path: ProductPath| [1, 2, 32, 33].map(|rows| path.taker(rows));
        assert_eq!(takers(ProductPath::Skinny), [Taker::Skinny, Taker::Skinny, Taker::Skinny, Taker::Library]);
        assert_eq!(takers(ProductPath::Vector), [Taker::Vector, Taker::Skinny, Taker::Skinny, Taker::Library]);
        assert_eq!(takers(ProductPath::Library), [Taker::Vector, Taker::Library, Taker::Library, Taker::Library]);
    }
}
