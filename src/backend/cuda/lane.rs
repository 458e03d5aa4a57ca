//! A second stream of a device, for what others (NCCL) do beside the computing.
//!
//! Invariant: what runs on a lane touches memory that the lane has been told of, from [`Lane::follow`] to [`Lane::rejoin`]; in between
//! nothing that is computed uses it.

use std::ffi::c_void;
use std::sync::Arc;

use super::Cuda;
use super::driver::{Event, Stream};
use super::matrix::{CudaMatrix, CudaScores};
use crate::BackendError;

/// The stream, with the device that it belongs to.
pub struct Lane {
    // Before the device, whose context it is of.
    stream: Stream,
    cuda: Arc<Cuda>,
}

/// A place on a lane or in the computing: the end of some work.
pub struct Mark(Event);

/// A run of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Device address of its start.
    pub address: u64,
    /// Its size.
    pub bytes: usize,
}

impl Lane {
    /// A lane of a device.
    pub fn new(cuda: &Arc<Cuda>) -> Result<Self, BackendError> {
        Ok(Self { stream: Stream::new(&cuda.context)?, cuda: cuda.clone() })
    }

    /// The device.
    pub fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// The stream as CUDA's libraries take it.
    pub fn raw(&self) -> *mut c_void {
        self.stream.raw()
    }

    /// Makes the device current on this thread.
    pub fn bind(&self, op: &'static str) -> Result<(), BackendError> {
        self.stream.bind(op)
    }

    /// What is issued on the lane from here on comes after all that has been issued for computing.
    pub fn follow(&self, op: &'static str) -> Result<(), BackendError> {
        self.stream.wait(&self.end_of(&self.cuda.stream)?)?;
        self.cuda.profile.lane_begins(&self.cuda.context, &self.stream, op)
    }

    /// The stream of the computing, as CUDA's libraries take it: for what is to be done in its order. It is idle, for the profile, until the next operation.
    pub fn computing(&self) -> Result<*mut c_void, BackendError> {
        self.cuda.mark(super::WAITING)?;
        Ok(self.cuda.stream.raw())
    }

    /// The computing's present end.
    pub fn mark_computing(&self) -> Result<Mark, BackendError> {
        Ok(Mark(self.end_of(&self.cuda.stream)?))
    }

    /// The lane's present end.
    pub fn mark(&self) -> Result<Mark, BackendError> {
        let end = self.end_of(&self.stream)?;
        self.cuda.profile.lane_ends(&self.cuda.context, &self.stream)?;
        Ok(Mark(end))
    }

    fn end_of(&self, stream: &Stream) -> Result<Event, BackendError> {
        let event = Event::untimed(&self.cuda.context)?;
        event.record(stream)?;
        Ok(event)
    }

    /// What is computed from here on comes after a mark.
    pub fn rejoin(&self, mark: &Mark) -> Result<(), BackendError> {
        self.cuda.mark(super::WAITING)?;
        self.cuda.stream.wait(&mark.0)
    }
}

impl Mark {
    /// Whether the lane has come so far.
    pub fn has_passed(&self) -> Result<bool, BackendError> {
        self.0.has_passed()
    }
}

impl CudaMatrix {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where `count` rows from row `first` on lie. A matrix in FP8 has no rows that lie together.
    pub fn extent(&self, first: usize, count: usize) -> Result<Extent, BackendError> {
        self.need("transfer", "rows", first + count, self.cols)?;
        Ok(Extent { address: self.row(first), bytes: count * self.cols * 2 })
    }
}

impl CudaScores {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where `count` rows from row `first` on lie.
    pub fn extent(&self, first: usize, count: usize) -> Result<Extent, BackendError> {
        super::matrix::need("transfer", "rows", (first + count, self.cols), (self.rows, self.cols))?;
        Ok(Extent { address: self.row(first), bytes: count * self.cols * 4 })
    }
}
