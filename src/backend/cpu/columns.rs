//! Groups of columns side by side, and below each other: how queries, keys and values become rows by head, and rows again.
//!
//! Invariant: nothing is written but the rows that are asked for.

use super::check;
use super::linear::check_rows;
use super::matrix::Matrix;
use crate::backend::BackendError;

/// `dst[dst_row + g * rows + i] = src[row + i, col + g * width ..]`, see [`stack_columns`](crate::backend::Backend::stack_columns).
pub(super) fn stack(
    src: &Matrix,
    (src_row, src_col): (usize, usize),
    rows: usize,
    groups: usize,
    dst: &mut Matrix,
    dst_row: usize,
) -> Result<(), BackendError> {
    let (op, width) = ("stack_columns", dst.cols());
    check_rows(op, "src", src_row + rows, src.cols(), src)?;
    check_rows(op, "dst", dst_row + groups * rows, width, dst)?;
    check_width(op, src_col + groups * width, src.cols())?;
    for (group, row) in (0..groups).flat_map(|group| (0..rows).map(move |row| (group, row))) {
        let from = &src.row(src_row + row)[src_col + group * width..][..width];
        dst.row_mut(dst_row + group * rows + row).copy_from_slice(from);
    }
    Ok(())
}

/// `dst[dst_row + i, g * width ..] = src[src_row + g * rows + i]`, see [`unstack_columns`](crate::backend::Backend::unstack_columns).
pub(super) fn unstack(
    src: &Matrix,
    src_row: usize,
    rows: usize,
    groups: usize,
    dst: &mut Matrix,
    dst_row: usize,
) -> Result<(), BackendError> {
    let (op, width) = ("unstack_columns", src.cols());
    check_rows(op, "src", src_row + groups * rows, width, src)?;
    check_rows(op, "dst", dst_row + rows, dst.cols(), dst)?;
    check_width(op, groups * width, dst.cols())?;
    for (group, row) in (0..groups).flat_map(|group| (0..rows).map(move |row| (group, row))) {
        let to = &mut dst.row_mut(dst_row + row)[group * width..][..width];
        to.copy_from_slice(src.row(src_row + group * rows + row));
    }
    Ok(())
}

fn check_width(op: &'static str, needed: usize, cols: usize) -> Result<(), BackendError> {
    check(op, needed <= cols, || (format!("at least {needed} columns"), format!("{cols}")))
}
