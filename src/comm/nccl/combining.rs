//! Partial results that become one without NCCL, by kernels in which the devices write into each other's memory.
//!
//! Invariant: nothing is combined before it was tried whether the devices have what the others write; a device that waits for others is let go when the
//! communicator ends.

use std::sync::Arc;
use std::time::Instant;

use super::NcclComm;
use super::shared::{Shared, device_error};
use crate::backend::cuda::{Cuda, CudaMatrix, CudaScores, Peers};
use crate::backend::{Backend, BackendError, HeadShape};
use crate::comm::call::Call;
use crate::comm::{Combining, CommError};

/// Has NCCL bring partial results too, where it is `off`.
pub const PEERS_VARIABLE: &str = "APBD_PEER_MEMORY";

/// Columns that are tried at the start: more than one block of threads takes.
const TRIED_COLS: usize = 4096;

/// The ends of devices that reach into each other's memory, by rank; none of any where they do not.
pub(super) fn connect(devices: &[Arc<Cuda>]) -> Result<Vec<Option<Peers>>, CommError> {
    let are_wanted = std::env::var(PEERS_VARIABLE).map_or(true, |value| value != "off");
    let ends = match are_wanted {
        true => Peers::connect(devices).map_err(device_error("start"))?,
        false => None,
    };
    Ok(match ends {
        Some(ends) => ends.into_iter().map(Some).collect(),
        None => devices.iter().map(|_| None).collect(),
    })
}

/// Whether every device has what the others write to it. A machine that only says that they reach each other would make nonsense of all answers.
pub(super) fn try_out(shared: &Shared, peers: &Peers, until: Instant) -> Result<(), CommError> {
    let (op, cuda) = ("start", shared.lane.cuda());
    let failed = shared.broken(op);
    let mut sums = cuda.scores(1, TRIED_COLS).map_err(&failed)?;
    cuda.set_scores(&vec![(1 << shared.rank) as f32; TRIED_COLS], &mut sums).map_err(&failed)?;
    let mut x = cuda.matrix_from(1, TRIED_COLS, &vec![0; TRIED_COLS]).map_err(&failed)?;
    // Twice: a mailbox has room for two turns.
    for _ in 0..2 {
        peers.add_sums(1, &sums, &mut x).map_err(&failed)?;
    }
    let mark = shared.lane.mark_computing().map_err(&failed)?;
    shared.wait_for(op, &mark, &|| until)?;
    // Every rank has a bit of its own, which bf16 holds exactly for as many as there are at most: the upper half of an f32.
    let expected = (2 * ((1 << shared.size) - 1)) as f32;
    if cuda.read_matrix(&x).map_err(&failed)?.iter().all(|value| u32::from(*value) << 16 == expected.to_bits()) {
        return Ok(());
    }
    let reason = format!("GPUs do not have what others wrote to their memory; {PEERS_VARIABLE}=off does without");
    Err(shared.fail(CommError::Device { op, reason }))
}

impl NcclComm {
    /// Combines rows of every rank, `[rows, cols]`, by `work`.
    fn combine(
        &self,
        (rows, cols): (usize, usize),
        work: impl FnOnce(&Peers) -> Result<(), BackendError>,
    ) -> Result<(), CommError> {
        let (call, shared) = (Call::Combine { rows, cols }, &*self.shared);
        let op = call.op();
        let Some(peers) = &shared.peers else {
            let reason = "the devices do not reach into each other's memory".to_owned();
            return Err(shared.fail(CommError::Device { op, reason }));
        };
        self.join(call)?;
        let since = Instant::now();
        work(peers).map_err(shared.broken(op))?;
        shared.watch_computing(op, since)?;
        shared.check()
    }
}

impl Combining<CudaMatrix, CudaScores> for NcclComm {
    fn merge_partials(
        &self,
        shape: HeadShape,
        rows: usize,
        (parts, lse): (&CudaMatrix, &CudaScores),
        into: (&mut CudaMatrix, usize),
    ) -> Result<(), CommError> {
        self.combine((rows, parts.cols()), |peers| peers.merge(shape, rows, (parts, lse), into))
    }

    fn add_sums(&self, rows: usize, sums: &CudaScores, x: &mut CudaMatrix) -> Result<(), CommError> {
        self.combine((rows, sums.cols()), |peers| peers.add_sums(rows, sums, x))
    }

    fn join_columns(&self, rows: usize, part: &CudaScores, out: &mut CudaScores) -> Result<(), CommError> {
        self.combine((rows, part.cols()), |peers| peers.join_columns(rows, part, out))
    }
}
