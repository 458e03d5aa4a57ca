//! Weights from a mapped file to the device: through pinned buffers, converted to bf16 there, every element checked.
//!
//! Invariant: a weight that holds a non-finite element never comes to be used.
#![allow(unsafe_code)]

use std::sync::PoisonError;

use rayon::prelude::*;

use super::Cuda;
use super::arena::Piece;
use super::driver::{Context, Event, Pinned, Stream, parameters};
use super::matrix::{CudaWeight, require};
use crate::{BackendError, DType, WeightView};

const OP: &str = "weight";
/// One of two buffers: one is filled from the file while the other travels.
const BUFFER_BYTES: usize = 32 << 20;
/// Bytes that one thread takes from the file at a time.
const COPY_BYTES: usize = 1 << 20;

/// The two buffers, in page-locked memory and on the device.
pub(super) struct Staging {
    buffers: [(Pinned, Event); 2],
    device: [Piece; 2],
    next: usize,
}

fn element_bytes(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::Bf16 => 2,
    }
}

/// `type` of weights.cu.
fn kernel_type(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
    }
}

impl Cuda {
    /// The matrices stacked by rows, as one.
    pub(super) fn load_weight(&self, views: &[WeightView<'_>]) -> Result<CudaWeight, BackendError> {
        let (rows, cols) = stacked_shape(views)?;
        let weight = CudaWeight { piece: self.arena.take(OP, rows * cols * 2)?, rows, cols };
        let bad = self.arena.take(OP, 8)?;
        // SAFETY: (1) the piece has 8 bytes.
        unsafe { self.stream.fill(OP, bad.address(), 0xff, 8) }?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if staging.is_none() {
            *staging = Some(Staging::new(self)?);
        }
        let staging = staging.as_mut().expect("just made");
        let mut first = 0;
        for view in views {
            for part in view.bytes.chunks(BUFFER_BYTES) {
                let at = staging.send(&self.stream, part)?;
                let count = part.len() / element_bytes(view.dtype);
                self.convert(at, view.dtype, count, first, weight.piece.address(), bad.address())?;
                first += count;
            }
        }
        let mut found = [0u64];
        // SAFETY: (1) the piece has 8 bytes.
        unsafe { self.stream.download(OP, bad.address(), bytemuck::cast_slice_mut(&mut found)) }?;
        refuse_bad(found[0], cols)?;
        Ok(weight)
    }

    fn convert(
        &self,
        from: u64,
        dtype: DType,
        count: usize,
        first: usize,
        base: u64,
        bad: u64,
    ) -> Result<(), BackendError> {
        let threads = 256;
        let grid = (count.div_ceil(threads).min(16 << 10), 1, 1);
        let (kind, to, count, first) = (kernel_type(dtype), base + 2 * first as u64, count as u64, first as u64);
        let parameters = parameters![from, kind, count, first, to, bad];
        // SAFETY: (1) parameters as in weights.cu; (2) pieces live until the stream has passed.
        unsafe { self.stream.launch(&self.functions.convert_weights, grid, threads, parameters) }
    }
}

/// Rows together and columns, once all are as large as they say.
fn stacked_shape(views: &[WeightView<'_>]) -> Result<(usize, usize), BackendError> {
    let cols = views.first().map_or(0, |view| view.cols);
    let mut rows = 0;
    for view in views {
        require(OP, view.cols == cols, &format!("{cols} columns"), view.cols)?;
        let bytes = view.rows * view.cols * element_bytes(view.dtype);
        require(OP, view.bytes.len() == bytes, &format!("{bytes} bytes"), view.bytes.len())?;
        rows += view.rows;
    }
    require(OP, rows > 0 && cols > 0, "at least one element", format!("[{rows}, {cols}]"))?;
    Ok((rows, cols))
}

/// `index` is the first element that is not finite, all ones if there is none.
fn refuse_bad(index: u64, cols: usize) -> Result<(), BackendError> {
    let (row, col) = (index / cols as u64, index % cols as u64);
    require(
        OP,
        index == u64::MAX,
        "finite elements, also in bf16",
        format!("one that is not, in row {row}, column {col}"),
    )
}

impl Staging {
    fn new(cuda: &Cuda) -> Result<Self, BackendError> {
        let context: &Context = &cuda.context;
        let buffer = || Ok::<_, BackendError>((Pinned::new(context, BUFFER_BYTES)?, Event::new(context)?));
        let device = || cuda.arena.take(OP, BUFFER_BYTES);
        Ok(Self { buffers: [buffer()?, buffer()?], device: [device()?, device()?], next: 0 })
    }

    /// Sends `part` on its way; it arrives at the address given back, in stream order.
    fn send(&mut self, stream: &Stream, part: &[u8]) -> Result<u64, BackendError> {
        let (pinned, sent) = &mut self.buffers[self.next];
        let to = self.device[self.next].address();
        sent.synchronize()?;
        let into = &mut pinned.bytes_mut()[..part.len()];
        into.par_chunks_mut(COPY_BYTES)
            .zip(part.par_chunks(COPY_BYTES))
            .for_each(|(into, from)| into.copy_from_slice(from));
        // SAFETY: (1) the device buffer is as large as the pinned one, which stays unchanged until its event has passed.
        unsafe { stream.upload(OP, &pinned.bytes()[..part.len()], to) }?;
        sent.record(stream)?;
        self.next ^= 1;
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_element_is_named_by_row_and_column() {
        assert!(refuse_bad(u64::MAX, 7).is_ok());
        let error = refuse_bad(3 * 7 + 5, 7).unwrap_err().to_string();
        assert!(error.contains("row 3, column 5"), "{error}");
    }

    #[test]
    fn stacked_matrices_have_the_same_columns_and_all_their_bytes() {
        let view = |cols, bytes| WeightView { rows: 2, cols, dtype: DType::F32, bytes };
        assert_eq!(stacked_shape(&[view(3, &[0; 24]), view(3, &[0; 24])]).unwrap(), (4, 3));
        assert!(stacked_shape(&[view(3, &[0; 24]), view(2, &[0; 16])]).is_err());
        assert!(stacked_shape(&[view(3, &[0; 23])]).is_err());
    }
}
