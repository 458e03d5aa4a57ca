//! Windows into matrices, and the matrix products between them.
//!
//! Windows can be split by rows and by columns, so that threads write disjoint tiles of one matrix.
//!
//! Invariant: a window lies inside the memory it was made from, and no two mutable windows share an element.

#![allow(unsafe_code)]

use std::marker::PhantomData;

use gemm::{Parallelism, gemm};

use super::matrix::Matrix;

/// A read-only window: row `i` starts at element `i * stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    stride: usize,
}

/// A writable window.
#[derive(Debug)]
pub(super) struct ViewMut<'a> {
    start: *mut f32,
    pub rows: usize,
    pub cols: usize,
    stride: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `ViewMut` is an exclusive borrow of its elements, like `&mut [f32]`, which is Send.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: through `&ViewMut` elements can only be read, like through `&&mut [f32]`, which is Sync.
unsafe impl Sync for ViewMut<'_> {}

impl<'a> View<'a> {
    /// A window of `rows` rows of `cols` elements, `stride` apart.
    ///
    /// # Panics
    /// If it does not lie inside `data`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "{rows} x {cols}, {stride} apart, of {} elements", data.len());
        Self { data, rows, cols, stride }
    }

    /// Rows and columns of a matrix.
    pub fn of(matrix: &'a Matrix, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Self {
        assert!(rows.end <= matrix.rows() && cols.end <= matrix.cols(), "a window inside the matrix");
        if rows.is_empty() || cols.is_empty() {
            return Self { data: &[], rows: rows.len(), cols: cols.len(), stride: matrix.cols() };
        }
        Self::new(&matrix.data()[rows.start * matrix.cols() + cols.start..], rows.len(), cols.len(), matrix.cols())
    }

    /// `rows` of its rows, from `first` on.
    pub fn part(&self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows {first}.. {rows} of {}", self.rows);
        let start = (first * self.stride).min(self.data.len());
        Self { data: &self.data[start..], rows, ..*self }
    }

    /// One row.
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..row * self.stride + self.cols]
    }
}

impl<'a> ViewMut<'a> {
    /// A window of `rows` rows of `cols` elements, `stride` apart.
    ///
    /// # Panics
    /// If it does not lie inside `data`, or rows overlap.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, stride), "{rows} x {cols}, {stride} apart, of {} elements", data.len());
        assert!(rows <= 1 || cols <= stride, "rows overlap");
        Self { start: data.as_mut_ptr(), rows, cols, stride, memory: PhantomData }
    }

    /// The first `rows` rows of a matrix.
    pub fn of(matrix: &'a mut Matrix, rows: usize) -> Self {
        let cols = matrix.cols();
        Self::new(matrix.data_mut(), rows, cols, cols)
    }

    /// One row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies inside the window, which is borrowed exclusively through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols) }
    }

    /// The rows before `row`, and the others.
    pub fn split_rows(self, row: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(row <= self.rows, "row {row} of {}", self.rows);
        // A window that ends with the last row may not be followed by a whole stride, hence `wrapping`.
        let rest = self.start.wrapping_add(row * self.stride);
        let Self { start, rows, cols, stride, memory } = self;
        (Self { start, rows: row, cols, stride, memory }, Self { start: rest, rows: rows - row, cols, stride, memory })
    }

    /// The columns before `col`, and the others.
    pub fn split_cols(self, col: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(col <= self.cols, "column {col} of {}", self.cols);
        let rest = self.start.wrapping_add(col);
        let Self { start, rows, cols, stride, memory } = self;
        (Self { start, rows, cols: col, stride, memory }, Self { start: rest, rows, cols: cols - col, stride, memory })
    }

    /// Tiles of at most `tile_rows` rows and `tile_cols` columns, row of tiles after row of tiles.
    pub fn tiles(self, tile_rows: usize, tile_cols: usize) -> Vec<Tile<'a>> {
        let mut tiles = Vec::new();
        let (mut below, mut row) = (self, 0);
        while below.rows > 0 {
            let height = tile_rows.min(below.rows);
            let (mut right, rest) = below.split_rows(height);
            let mut col = 0;
            while right.cols > 0 {
                let width = tile_cols.min(right.cols);
                let (out, others) = right.split_cols(width);
                tiles.push(Tile { row, col, out });
                (right, col) = (others, col + width);
            }
            (below, row) = (rest, row + height);
        }
        tiles
    }

    /// The same window, for a while.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { start: self.start, rows: self.rows, cols: self.cols, stride: self.stride, memory: PhantomData }
    }
}

/// A window with its place in the window that it was cut from.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    pub row: usize,
    pub col: usize,
    pub out: ViewMut<'a>,
}

/// Whether a window of that shape lies inside `length` elements.
fn fits(length: usize, rows: usize, cols: usize, stride: usize) -> bool {
    rows == 0
        || cols == 0
        || (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(cols)).is_some_and(|n| n <= length)
}

/// `out = a bᵀ`, or `out += a bᵀ`, on the calling thread.
pub(super) fn multiply_transposed(a: View<'_>, b: View<'_>, out: ViewMut<'_>, accumulate: bool) {
    assert!(a.cols == b.cols && out.rows == a.rows && out.cols == b.rows, "a bᵀ: shapes");
    multiply(a, b.data.as_ptr(), b.stride, 1, out, accumulate);
}

/// `out += a b`, on the calling thread.
pub(super) fn multiply_add(a: View<'_>, b: View<'_>, out: ViewMut<'_>) {
    assert!(a.cols == b.rows && out.rows == a.rows && out.cols == b.cols, "a b: shapes");
    multiply(a, b.data.as_ptr(), 1, b.stride, out, true);
}

/// `out = a B` or `out += a B`, where `B[i, j]` is `b[i * depth_step + j * col_step]`.
fn multiply(a: View<'_>, b: *const f32, col_step: usize, depth_step: usize, mut out: ViewMut<'_>, accumulate: bool) {
    if a.cols == 0 {
        if !accumulate {
            (0..out.rows).for_each(|row| out.row_mut(row).fill(0.0));
        }
        return;
    }
    // SAFETY: the shapes were compared by the callers, so that every element that is read lies inside the windows `a` and
    // `b`, and every element that is written inside `out`, which is exclusive and hence apart from both.
    unsafe {
        gemm(
            out.rows,
            out.cols,
            a.cols,
            out.start,
            1,
            out.stride as isize,
            accumulate,
            a.data.as_ptr(),
            1,
            a.stride as isize,
            b,
            col_step as isize,
            depth_step as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{Tile, View, ViewMut, multiply_add, multiply_transposed};

    #[test]
    fn tiles_cover_every_element_once() {
        let mut data = vec![0.0; 7 * 11];
        for Tile { row, col, mut out } in ViewMut::new(&mut data, 7, 10, 11).tiles(3, 4) {
            for i in 0..out.rows {
                out.row_mut(i).iter_mut().enumerate().for_each(|(j, x)| *x += ((row + i) * 11 + col + j) as f32 + 1.0);
            }
        }
        for (i, &x) in data.iter().enumerate() {
            assert_eq!(x, if i % 11 == 10 { 0.0 } else { i as f32 + 1.0 });
        }
    }

    #[test]
    fn products_of_windows_with_strides() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let a = View::new(&a, 2, 3, 5);
        let b: Vec<f32> = (0..20).map(|i| (i % 7) as f32).collect();
        let mut out = vec![f32::NAN; 2 * 4];
        multiply_transposed(a, View::new(&b, 4, 3, 4), ViewMut::new(&mut out, 2, 4, 4), false);
        let wanted = |i: usize, j: usize| (0..3).map(|k| a.row(i)[k] * b[j * 4 + k]).sum::<f32>();
        assert_eq!(out, (0..8).map(|i| wanted(i / 4, i % 4)).collect::<Vec<_>>());

        let mut out = vec![1.0; 2 * 4];
        multiply_add(a, View::new(&b, 3, 4, 6), ViewMut::new(&mut out, 2, 4, 4));
        let wanted = |i: usize, j: usize| 1.0 + (0..3).map(|k| a.row(i)[k] * b[k * 6 + j]).sum::<f32>();
        assert_eq!(out, (0..8).map(|i| wanted(i / 4, i % 4)).collect::<Vec<_>>());
    }

    #[test]
    #[should_panic(expected = "of 5 elements")]
    fn a_window_beyond_its_memory_is_refused() {
        View::new(&[0.0; 5], 2, 3, 3);
    }
}
