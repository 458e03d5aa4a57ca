//! Groups of columns side by side, and below each other: how queries, keys and values become rows by head, and rows again.
//!
//! Invariant: nothing is written but the rows that are asked for.

use super::check;
use super::linear::check_rows;
use super::matrix::{Matrix, Scores};
use crate::{BackendError, even_part};

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

/// `out[i, first of part p ..] = parts[p * rows + i]`, see [`join_columns`](crate::Backend::join_columns).
pub(super) fn join(rows: usize, count: usize, parts: &Scores, out: &mut Scores) -> Result<(), BackendError> {
    let (op, cols) = ("join_columns", out.cols());
    check_rows(op, "parts", count * rows, even_part(cols, 0, count).len(), parts)?;
    check_rows(op, "out", rows, cols, out)?;
    // From the last part on: where two have a column, the first of them has the last word.
    for (part, row) in (0..count).rev().flat_map(|part| (0..rows).map(move |row| (part, row))) {
        out.row_mut(row)[even_part(cols, part, count)].copy_from_slice(parts.row(part * rows + row));
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
    fn parts_are_joined_and_of_two_that_have_a_column_the_first_is_taken() {
        for (cols, count) in [(48, 2), (50, 3), (17, 2), (5, 4), (1, 8), (333, 8)] {
            let (rows, width) = (3, even_part(cols, 0, count).len());
            // An element says which part it is from, which row, and which column.
            let value = |part: usize, row: usize, col: usize| (part * 10_000 + row * 1000 + col) as f32;
            let of_part = |part| {
                (0..rows).flat_map(move |row| even_part(cols, part, count).map(move |col| value(part, row, col)))
            };
            let parts = Scores::from_vec(count * rows, width, (0..count).flat_map(of_part).collect());
            let mut out = Scores::from_vec(rows + 1, cols, vec![-1.0; (rows + 1) * cols]);
            join(rows, count, &parts, &mut out).expect("fits");
            for (row, col) in (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))) {
                let first =
                    (0..count).find(|part| even_part(cols, *part, count).contains(&col)).expect("some part has it");
                assert_eq!(out.row(row)[col], value(first, row, col), "{count} parts of {cols}");
            }
            assert!(out.row(rows).iter().all(|element| *element == -1.0));
            assert!(join(rows + 1, count, &parts, &mut out).is_err());
        }
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
