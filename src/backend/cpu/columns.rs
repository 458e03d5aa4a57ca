//! Groups of columns side by side, and below each other: how queries, keys and values become rows by head, and rows again.
//!
//! Invariant: nothing is written but the rows that are asked for.

use super::check;
use super::linear::check_rows;
use super::matrix::Matrix;
use crate::BackendError;

/// `dst[dst_row + g * rows + i] = src[row + i, col + g * width ..]`, see [`stack_columns`](crate::Backend::stack_columns).
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

/// `dst[dst_row + i, g * width ..] = src[src_row + g * rows + i]`, see [`unstack_columns`](crate::Backend::unstack_columns).
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_stacked_and_come_back_and_nothing_else_is_touched() {
        let (rows, groups, width, first_col, cols) = (3, 2, 4, 5, 14);
        let src = Matrix::from_vec(4, cols, (0..4 * cols).map(|i| i as f32).collect());
        let mut stacked = Matrix::from_vec(8, width, vec![-1.0; 8 * width]);
        stack(&src, (1, first_col), rows, groups, &mut stacked, 1).expect("fits");
        for (group, row) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
            let from = &src.row(1 + row)[first_col + group * width..][..width];
            assert_eq!(stacked.row(1 + group * rows + row), from, "group {group}, row {row}");
        }
        assert!(stacked.row(0).iter().chain(stacked.row(7)).all(|element| *element == -1.0));
        let mut back = Matrix::from_vec(4, 9, vec![-1.0; 36]);
        unstack(&stacked, 1, rows, groups, &mut back, 1).expect("fits");
        for row in 0..rows {
            assert_eq!(back.row(1 + row)[..8], src.row(1 + row)[first_col..first_col + 8]);
            assert_eq!(back.row(1 + row)[8], -1.0);
        }
        assert!(back.row(0).iter().all(|element| *element == -1.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (src, mut dst) = (Matrix::zeros(4, 8), Matrix::zeros(6, 3));
        for (at, rows, groups, to) in [((0, 0), 3, 3, 0), ((2, 0), 3, 2, 0), ((0, 3), 3, 2, 0), ((0, 0), 3, 2, 1)] {
            let refused = stack(&src, at, rows, groups, &mut dst, to);
            assert!(matches!(refused, Err(BackendError::Shape { .. })), "{at:?}, {rows} rows, {groups} groups");
        }
        assert!(unstack(&dst, 0, 3, 2, &mut Matrix::zeros(3, 5), 0).is_err());
    }
}
