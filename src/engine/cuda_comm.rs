//! What joins the ranks of an engine on GPUs: NCCL, or nothing where there is one.
//!
//! Invariant: an engine on one GPU needs no NCCL.

use crate::backend::cuda::{CudaMatrix, CudaScores};
use crate::comm::nccl::{self, NcclComm};
use crate::comm::solo::SoloComm;
use crate::comm::{Combining, Comm, CommError, Partials};

/// One rank's end.
pub enum CudaComm {
    /// The only rank's.
    Alone(SoloComm),
    /// One of several.
    Group(NcclComm),
}

/// A collective that has been started.
#[must_use = "a started collective has to be finished"]
pub enum Pending<const N: usize> {
    /// Done as it was started.
    Alone([CudaMatrix; N]),
    /// Between devices.
    Group(nccl::Pending<N>),
}

/// An all-to-all that has been started.
#[must_use = "a started all-to-all has to be finished"]
pub enum Exchange<const N: usize> {
    /// Done as it was started.
    Alone(([CudaMatrix; N], [CudaMatrix; N])),
    /// Between devices.
    Group(nccl::Pending<N>),
}

const ONE_END: &str = "a collective is finished by the end that started it";

/// The same call on either kind of end, over matrices of a GPU.
macro_rules! either {
    ($self:expr, $method:ident($($argument:expr),*)) => {
        match $self {
            CudaComm::Alone(end) => Comm::<CudaMatrix, CudaScores>::$method(end, $($argument),*),
            CudaComm::Group(end) => end.$method($($argument),*),
        }
    };
    ($self:expr, $method:ident($($argument:expr),*) as $started:ident) => {
        match $self {
            CudaComm::Alone(end) => {
                Comm::<CudaMatrix, CudaScores>::$method(end, $($argument),*).map($started::Alone)
            }
            CudaComm::Group(end) => end.$method($($argument),*).map($started::Group),
        }
    };
    ($self:expr, $method:ident($started:ident: $value:expr)) => {
        match ($self, $value) {
            (CudaComm::Alone(end), $started::Alone(started)) => {
                Comm::<CudaMatrix, CudaScores>::$method(end, started)
            }
            (CudaComm::Group(end), $started::Group(started)) => end.$method(started),
            _ => unreachable!("{ONE_END}"),
        }
    };
}

impl Comm<CudaMatrix, CudaScores> for CudaComm {
    type Pending<const N: usize> = Pending<N>;
    type Exchange<const N: usize> = Exchange<N>;

    fn rank(&self) -> usize {
        either!(self, rank())
    }

    fn size(&self) -> usize {
        either!(self, size())
    }

    fn all_gather<const N: usize>(&self, rows: [CudaMatrix; N], counts: &[usize]) -> Result<Pending<N>, CommError> {
        either!(self, all_gather(rows, counts) as Pending)
    }

    fn all_to_all<const N: usize>(
        &self,
        send: [CudaMatrix; N],
        send_counts: &[usize],
        receive: [CudaMatrix; N],
        receive_counts: &[usize],
    ) -> Result<Exchange<N>, CommError> {
        either!(self, all_to_all(send, send_counts, receive, receive_counts) as Exchange)
    }

    fn finish_all_to_all<const N: usize>(
        &self,
        exchange: Exchange<N>,
    ) -> Result<([CudaMatrix; N], [CudaMatrix; N]), CommError> {
        either!(self, finish_all_to_all(Exchange: exchange))
    }

    fn finish<const N: usize>(&self, pending: Pending<N>) -> Result<[CudaMatrix; N], CommError> {
        either!(self, finish(Pending: pending))
    }

    fn all_gather_partials(
        &self,
        partials: Partials<'_, CudaMatrix, CudaScores>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        either!(self, all_gather_partials(partials, counts))
    }

    fn combining(&self, rows: usize, width: usize) -> Option<&dyn Combining<CudaMatrix, CudaScores>> {
        either!(self, combining(rows, width))
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        either!(self, broadcast(root, value))
    }

    fn barrier(&self) -> Result<(), CommError> {
        either!(self, barrier())
    }

    fn come_further(&self) {
        either!(self, come_further());
    }

    fn check(&self) -> Result<(), CommError> {
        either!(self, check())
    }

    fn abort(&self, reason: &str) {
        either!(self, abort(reason));
    }
}
