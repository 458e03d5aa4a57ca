//! RoPE, and the write of keys and values: of successive rows of one sequence, or of one row each of many.
//!
//! Invariant: kernels are launched on checked shapes only; a row's place is checked before any row is written.
#![allow(unsafe_code)]

use std::ops::Range;

use super::driver::parameters;
use super::kept::Rows;
use super::matrix::{CudaMatrix, Fp8Scales, require};
use super::{Cuda, KvMut};
use crate::{BackendError, HeadShape};

/// As in kernels/rope.h.
const MAX_RUNS: usize = 64;
/// As in kernels/rope.h.
const MAX_PAIRS: usize = 128;
/// As in kernels/rope.h.
const MAX_PLACES: usize = 64;
/// Largest head that keys and values in FP8 may have.
const MAX_FP8_DIM: usize = 128;
/// Threads of a row's block.
const THREADS: usize = 256;

/// `PositionRuns` of rope.h.
#[repr(C)]
struct PositionRuns {
    count: i32,
    row: [i32; MAX_RUNS],
    position: [u32; MAX_RUNS],
}

/// `Frequencies` of rope.h.
#[repr(C)]
struct Frequencies {
    scale: f32,
    radians: [f32; MAX_PAIRS],
}

/// `Places` of rope.h.
#[repr(C)]
struct Places {
    k: [u64; MAX_PLACES],
    v: [u64; MAX_PLACES],
    position: [u32; MAX_PLACES],
}

/// `Fp8Places` of rope.h.
#[repr(C)]
struct Fp8Places {
    k: [u64; MAX_PLACES],
    v: [u64; MAX_PLACES],
    k_scales: [u64; MAX_PLACES],
    v_scales: [u64; MAX_PLACES],
    row: [i32; MAX_PLACES],
    capacity: [i32; MAX_PLACES],
    position: [u32; MAX_PLACES],
}

impl Cuda {
    pub(super) fn run_rope_store(
        &self,
        shape: HeadShape,
        rows: Range<usize>,
        positions: &[u32],
        (inv_freq, scale): (&[f32], f32),
        qkv: &mut CudaMatrix,
        kv: KvMut<'_, CudaMatrix>,
    ) -> Result<(), BackendError> {
        let op = "rope_store";
        qkv.need(op, "qkv", rows.end, shape.qkv_width())?;
        kv.k.need_either(op, "keys", kv.first_row + rows.len(), shape.kv_width())?;
        kv.v.need_either(op, "values", kv.first_row + rows.len(), shape.kv_width())?;
        let is_plain = kv.k.fp8.is_none() && kv.v.fp8.is_none();
        require(op, positions.len() == rows.len(), &format!("{} positions", rows.len()), positions.len())?;
        let frequencies = Frequencies::new(op, shape, inv_freq, scale)?;
        let mut first = 0;
        while first < positions.len() {
            let (runs, count) = PositionRuns::new(&positions[first..]);
            let destination = kv.first_row + first;
            let [heads, kv_heads, head_dim] = [shape.heads, shape.kv_heads, shape.head_dim].map(|n| n as i32);
            let at = qkv.row(rows.start + first);
            let (k, v) = if is_plain { (kv.k.row(destination), kv.v.row(destination)) } else { (0, 0) };
            let parameters = parameters![runs, frequencies, heads, kv_heads, head_dim, at, k, v];
            // SAFETY: (1) parameters as in rope_store.cu; (2) matrices are borrowed.
            unsafe { self.stream.launch(&self.functions.rope_store, (count, 1, 1), THREADS, parameters) }?;
            first += count;
        }
        if is_plain {
            return Ok(());
        }
        let keys = qkv.row(rows.start) + (shape.q_width() * 2) as u64;
        let from = [keys, keys + (shape.kv_width() * 2) as u64];
        let rows = Rows { count: rows.len(), stride: qkv.cols };
        self.keep(shape.head_dim, &rows, &from, &[kv.k, kv.v], kv.first_row)
    }

    pub(super) fn run_rope_store_each(
        &self,
        shape: HeadShape,
        positions: &[u32],
        (inv_freq, scale): (&[f32], f32),
        qkv: &mut CudaMatrix,
        places: &[KvMut<'_, CudaMatrix>],
    ) -> Result<(), BackendError> {
        let op = "rope_store_each";
        qkv.need(op, "qkv", positions.len(), shape.qkv_width())?;
        require(op, places.len() == positions.len(), &format!("{} places", positions.len()), places.len())?;
        for KvMut { k, v, first_row } in places {
            k.need_either(op, "keys", first_row + 1, shape.kv_width())?;
            v.need_either(op, "values", first_row + 1, shape.kv_width())?;
        }
        let in_fp8 = places.iter().flat_map(|place| [&*place.k, &*place.v]).filter(|matrix| matrix.fp8.is_some());
        let in_fp8 = in_fp8.count();
        require(op, in_fp8 == 0 || in_fp8 == 2 * places.len(), "places all in bf16 or all in FP8", in_fp8)?;
        require(
            op,
            in_fp8 == 0 || shape.head_dim <= MAX_FP8_DIM,
            &format!("head_dim of at most {MAX_FP8_DIM} in FP8"),
            shape.head_dim,
        )?;
        let frequencies = Frequencies::new(op, shape, inv_freq, scale)?;
        let [heads, kv_heads, head_dim] = [shape.heads, shape.kv_heads, shape.head_dim].map(|n| n as i32);
        for (chunk, (positions, places)) in positions.chunks(MAX_PLACES).zip(places.chunks(MAX_PLACES)).enumerate() {
            let (grid, at) = ((positions.len(), 1, 1), qkv.row(chunk * MAX_PLACES));
            if in_fp8 == 0 {
                let places = Places::new(positions, places);
                let parameters = parameters![places, frequencies, heads, kv_heads, head_dim, at];
                // SAFETY: (1) parameters as in rope_store.cu; (2) matrices are borrowed.
                unsafe { self.stream.launch(&self.functions.rope_store_each, grid, THREADS, parameters) }?;
            } else {
                let places = Fp8Places::new(positions, places);
                let parameters = parameters![places, frequencies, heads, kv_heads, head_dim, at];
                // SAFETY: (1), (2) as above.
                unsafe { self.stream.launch(&self.functions.rope_store_each_fp8, grid, THREADS, parameters) }?;
            }
        }
        Ok(())
    }
}

impl Frequencies {
    /// One for every pair of a head.
    fn new(op: &'static str, shape: HeadShape, inv_freq: &[f32], scale: f32) -> Result<Self, BackendError> {
        let half = shape.head_dim / 2;
        require(op, inv_freq.len() == half, &format!("{half} frequencies"), inv_freq.len())?;
        require(
            op,
            shape.head_dim.is_multiple_of(16) && half <= MAX_PAIRS,
            "head_dim a multiple of 16, at most 256",
            shape.head_dim,
        )?;
        let mut frequencies = Self { scale, radians: [0.0; MAX_PAIRS] };
        frequencies.radians[..half].copy_from_slice(inv_freq);
        Ok(frequencies)
    }
}

impl Places {
    /// Of checked matrices in bf16.
    fn new(positions: &[u32], places: &[KvMut<'_, CudaMatrix>]) -> Self {
        let mut table = Self { k: [0; MAX_PLACES], v: [0; MAX_PLACES], position: [0; MAX_PLACES] };
        for (i, (position, KvMut { k, v, first_row })) in positions.iter().zip(places).enumerate() {
            (table.k[i], table.v[i]) = (k.row(*first_row), v.row(*first_row));
            table.position[i] = *position;
        }
        table
    }
}

impl Fp8Places {
    /// Of checked matrices in FP8.
    fn new(positions: &[u32], places: &[KvMut<'_, CudaMatrix>]) -> Self {
        let (none, zero) = ([0; MAX_PLACES], [0; MAX_PLACES]);
        let position = [0; MAX_PLACES];
        let mut table = Self { k: none, v: none, k_scales: none, v_scales: none, row: zero, capacity: zero, position };
        for (i, (position, KvMut { k, v, first_row })) in positions.iter().zip(places).enumerate() {
            (table.k[i], table.v[i]) = (k.piece.address(), v.piece.address());
            (table.k_scales[i], table.v_scales[i]) = (Fp8Scales::address_of(k), Fp8Scales::address_of(v));
            (table.row[i], table.capacity[i]) = (*first_row as i32, k.rows as i32);
            table.position[i] = *position;
        }
        table
    }
}

impl PositionRuns {
    /// The first runs of ascending positions, as many as fit, and how many positions they are.
    fn new(positions: &[u32]) -> (Self, usize) {
        let mut runs = Self { count: 0, row: [0; MAX_RUNS], position: [0; MAX_RUNS] };
        for (i, &position) in positions.iter().enumerate() {
            let continues = i > 0 && Some(position) == positions[i - 1].checked_add(1);
            if continues {
                continue;
            }
            if runs.count as usize == MAX_RUNS {
                return (runs, i);
            }
            runs.row[runs.count as usize] = i as i32;
            runs.position[runs.count as usize] = position;
            runs.count += 1;
        }
        (runs, positions.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_cut_into_runs() {
        let (runs, count) = PositionRuns::new(&[7, 8, 9, 100, 101, 3]);
        assert_eq!((runs.count, count), (3, 6));
        assert_eq!((&runs.row[..3], &runs.position[..3]), (&[0, 3, 5][..], &[7, 100, 3][..]));
    }

    #[test]
    fn more_runs_than_fit_are_left_for_another_launch() {
        let positions: Vec<u32> = (0..100).map(|i| 2 * i).collect();
        let (runs, count) = PositionRuns::new(&positions);
        assert_eq!((runs.count as usize, count), (MAX_RUNS, MAX_RUNS));
    }
}
