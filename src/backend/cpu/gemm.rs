//! Matrix products of strided views: a safe face on the `gemm` crate, one thread a call.
//!
//! Invariant: no pointer leaves its slice; callers split the work among threads, so that a product never waits for another.

#![allow(unsafe_code)]

/// A matrix in a slice: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major with `stride` elements from row to row.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(), "a view beyond its slice");
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// What happens to the elements that are there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// Overwritten.
    Set,
    /// Added to.
    Add,
}

/// `out = a b` or `out += a b`; `out` is row-major with `stride` elements from row to row.
pub(super) fn multiply(a: View<'_>, b: View<'_>, out: &mut [f32], stride: usize, write: Write) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= out.len(), "a product beyond its slice");
    let keep = write == Write::Add;
    // SAFETY: views and `out` were checked against their slices; `out` is borrowed mutably, so it overlaps neither operand; strides and sizes
    // of slices in memory fit an isize.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            keep,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            if keep { 1.0_f32 } else { 0.0 },
            1.0_f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_strided_and_transposed_views() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0, 9.0];
        let b = [5.0, 6.0, 7.0, 8.0];
        let mut out = [1.0; 6];
        multiply(View::rows(&a, 2, 2, 3), View::rows(&b, 2, 2, 2), &mut out, 3, Write::Set);
        assert_eq!(out, [19.0, 22.0, 1.0, 43.0, 50.0, 1.0]);
        multiply(View::rows(&a, 2, 2, 3), View::rows(&b, 2, 2, 2).transposed(), &mut out, 3, Write::Add);
        assert_eq!(out, [19.0 + 17.0, 22.0 + 23.0, 1.0, 43.0 + 39.0, 50.0 + 53.0, 1.0]);
    }
}
