//! Groups of columns put below each other, and back: what queries, keys and values need to travel by head.
//!
//! Invariant: the kernel is launched on checked shapes only.
#![allow(unsafe_code)]

use super::Cuda;
use super::driver::parameters;
use super::matrix::{CudaMatrix, require};
use crate::BackendError;

/// Threads of a block.
const THREADS: usize = 256;

/// Where the first element is, and how many elements apart rows and groups are.
struct Strides {
    at: u64,
    row: usize,
    group: usize,
}

impl Cuda {
    pub(super) fn run_stack_columns(
        &self,
        src: &CudaMatrix,
        (src_row, src_col): (usize, usize),
        rows: usize,
        groups: usize,
        (dst, dst_row): (&CudaMatrix, usize),
    ) -> Result<(), BackendError> {
        let (op, width) = ("stack_columns", dst.cols);
        src.need(op, "src", src_row + rows, src.cols)?;
        dst.need(op, "dst", dst_row + groups * rows, width)?;
        let last = src_col + groups * width;
        require(op, last <= src.cols, &format!("at least {last} columns"), src.cols)?;
        let whole = width.is_multiple_of(8) && src_col.is_multiple_of(8) && src.cols.is_multiple_of(8);
        require(op, whole, "columns in multiples of 8", format!("{width} from {src_col} of {}", src.cols))?;
        let from = Strides { at: src.row(src_row) + 2 * src_col as u64, row: src.cols, group: width };
        let to = Strides { at: dst.row(dst_row), row: width, group: rows * width };
        self.move_columns(&from, &to, rows, groups, width)
    }

    pub(super) fn run_unstack_columns(
        &self,
        src: &CudaMatrix,
        src_row: usize,
        rows: usize,
        groups: usize,
        (dst, dst_row): (&CudaMatrix, usize),
    ) -> Result<(), BackendError> {
        let (op, width) = ("unstack_columns", src.cols);
        src.need(op, "src", src_row + groups * rows, width)?;
        dst.need(op, "dst", dst_row + rows, dst.cols)?;
        let last = groups * width;
        require(op, last <= dst.cols, &format!("at least {last} columns"), dst.cols)?;
        let whole = width.is_multiple_of(8) && dst.cols.is_multiple_of(8);
        require(op, whole, "columns in multiples of 8", format!("{width} of {}", dst.cols))?;
        let from = Strides { at: src.row(src_row), row: width, group: rows * width };
        let to = Strides { at: dst.row(dst_row), row: dst.cols, group: width };
        self.move_columns(&from, &to, rows, groups, width)
    }

    fn move_columns(
        &self,
        from: &Strides,
        to: &Strides,
        rows: usize,
        groups: usize,
        width: usize,
    ) -> Result<(), BackendError> {
        let grid = ((rows * width / 8).div_ceil(THREADS), groups, 1);
        let (src, from_row, from_group) = (from.at, from.row as i32, from.group as u64);
        let (dst, to_row, to_group) = (to.at, to.row as i32, to.group as u64);
        let (rows, width) = (rows as i32, width as i32);
        let parameters = parameters![src, from_row, from_group, dst, to_row, to_group, rows, width];
        // SAFETY: (1) parameters as in columns.cu; (2) matrices are borrowed by the callers, which have checked their shapes.
        unsafe { self.stream.launch(&self.functions.move_columns, grid, THREADS, parameters) }
    }
}
