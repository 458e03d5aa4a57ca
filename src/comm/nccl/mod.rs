//! Ranks on GPUs, joined by NCCL: one rank a device, any number of them in one process.
//!
//! Partial results are so little that what a collective of NCCL's costs is all in its beginning and its end. Where all devices are of one process and reach
//! into each other's memory, kernels of our own combine them ([`combining`]).
//!
//! Rows go from device to device on a stream of their own, beside the computing: a collective begins when what was computed before it is done, and
//! [`Comm::finish`] makes what is computed after it wait; the host waits for neither. Partial results, which all that follows needs, go in the order of the
//! computing itself: that spares them the changes of streams. What is not rows (a word, a barrier, whether the sizes agree) goes
//! through the ranks' common memory. A thread watches each rank, see [`watch`].
//!
//! Invariant: memory that a collective uses is not given back before the device's computing waits for that collective; a communicator that has failed is
//! never used again.
#![allow(unsafe_code)]

mod combining;
mod library;
mod shared;
mod transfers;
mod watch;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use combining::PEERS_VARIABLE;
pub use library::{LIBRARY_VARIABLE, UniqueId, leave_multicast_off};

use super::call::{Call, Unfit};
use super::hub::{self, Met, Place, Side};
use super::meeting::Meeting;
use super::rounds::{Deposit, Rounds};
use super::{Combining, Comm, CommError, Partials};
use crate::backend::cuda::{Cuda, CudaMatrix, CudaScores, Extent, Lane, Mark, Peers};
use crate::backend::{Backend, BackendError};
use library::{Nccl, Progress, Transfer};
use shared::{Shared, device_error};

/// How long ranks wait for each other.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// Until all are there and connected.
    pub start: Duration,
    /// For one collective, from when a rank has asked for it, or any has last come further, until its device has passed it.
    pub collective: Duration,
}

/// One rank's end of a communicator between GPUs.
pub struct NcclComm {
    shared: Arc<Shared>,
    /// Collectives started so far by this rank: the number of the next round.
    started: AtomicU64,
    watch: Option<JoinHandle<()>>,
}

/// A collective that has been started, and its matrices.
#[must_use = "a started collective has to be finished"]
pub struct Pending<const N: usize> {
    shared: Arc<Shared>,
    mark: Arc<Mark>,
    /// What the caller gets back; absent once it has.
    rows: Option<[CudaMatrix; N]>,
    /// What is sent from, where those are others.
    sent: Option<[CudaMatrix; N]>,
}

fn not_started(reason: String) -> CommError {
    CommError::Device { op: "start", reason }
}

fn dimensions(matrix: &CudaMatrix) -> (usize, usize) {
    (matrix.rows(), matrix.cols())
}

/// The first row of each matrix.
fn places(matrices: &[CudaMatrix]) -> Result<Vec<Extent>, BackendError> {
    matrices.iter().map(|matrix| matrix.extent(0, 1)).collect()
}

impl NcclComm {
    /// The ends of a communicator between devices of this process, by rank, connected and tried.
    ///
    /// # Panics
    /// If there are no devices.
    pub fn group(devices: &[Arc<Cuda>], deadlines: Deadlines) -> Result<Vec<Self>, CommError> {
        assert!(!devices.is_empty(), "a communicator has at least one rank");
        let id = UniqueId::new().map_err(not_started)?;
        let meeting = Meeting::Here(Arc::new(Rounds::new(devices.len(), deadlines.collective)));
        let meetings = devices.iter().map(|_| meeting.clone()).collect();
        Self::start_all(id, (0, devices.len()), devices, meetings, combining::connect(devices)?, deadlines)
    }

    /// The ends of this node's devices; every node has as many. What comes with them has to be kept as long as they.
    pub fn group_at(
        place: &Place,
        devices: &[Arc<Cuda>],
        deadlines: Deadlines,
    ) -> Result<(Vec<Self>, Side), CommError> {
        // Where NCCL's own ranks meet is the process that has made the id.
        let own = match place.node {
            0 => UniqueId::new().map_err(not_started)?.to_bytes(),
            _ => Vec::new(),
        };
        let Met { meetings, secret, side } = hub::meet(place, devices.len(), deadlines.collective, &own)?;
        let id = UniqueId::from_bytes(&secret)
            .ok_or_else(|| not_started("what the first node told is no id of NCCL's".to_owned()))?;
        let ranks = (place.node * devices.len(), place.nodes * devices.len());
        let none = devices.iter().map(|_| None).collect();
        Ok((Self::start_all(id, ranks, devices, meetings, none, deadlines)?, side))
    }

    /// Ranks from `first` on, of `size` in all, begun together and then connected.
    fn start_all(
        id: UniqueId,
        (first, size): (usize, usize),
        devices: &[Arc<Cuda>],
        meetings: Vec<Meeting>,
        peers: Vec<Option<Peers>>,
        deadlines: Deadlines,
    ) -> Result<Vec<Self>, CommError> {
        let nccl = library::nccl().map_err(not_started)?;
        let mut ends = Vec::with_capacity(devices.len());
        for (index, (device, (meeting, peers))) in devices.iter().zip(meetings.into_iter().zip(peers)).enumerate() {
            ends.push(Self::begin(nccl, id, (first + index, size), device, (meeting, peers), deadlines)?);
        }
        let outcomes: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = ends.iter().map(|end| scope.spawn(|| end.connect(deadlines.start))).collect();
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
        });
        let mut worst = Ok(());
        for outcome in outcomes {
            let outcome = outcome.unwrap_or_else(|_| Err(not_started("a rank panicked".to_owned())));
            // What other ranks say of a failure is only its echo.
            if worst.is_ok() || (matches!(worst, Err(CommError::Aborted { .. })) && outcome.is_err()) {
                worst = outcome;
            }
        }
        worst?;
        ends.into_iter().map(Self::with_watch).collect()
    }

    /// One rank's end, not yet connected.
    fn begin(
        nccl: &'static Nccl,
        id: UniqueId,
        (rank, size): (usize, usize),
        device: &Arc<Cuda>,
        (meeting, peers): (Meeting, Option<Peers>),
        deadlines: Deadlines,
    ) -> Result<Self, CommError> {
        let lane = Lane::new(device).map_err(device_error("start"))?;
        lane.bind("start").map_err(device_error("start"))?;
        let handle = nccl.begin(id, rank, size).map_err(not_started)?;
        let shared = Arc::new(Shared {
            rank,
            size,
            deadline: deadlines.collective,
            nccl,
            meeting,
            handle: Mutex::new(Some(handle)),
            under_way: Mutex::default(),
            met: Mutex::default(),
            closing: AtomicBool::new(false),
            peers,
            lane,
        });
        Ok(Self { shared, started: AtomicU64::new(0), watch: None })
    }

    /// Waits until all ranks are there, and has each of them send to each other once: connections are made at the first use, and this is it.
    fn connect(&self, within: Duration) -> Result<(), CommError> {
        let shared = &*self.shared;
        let until = Instant::now() + within;
        shared.with_handle("start", |handle| shared.issued("start", handle, Progress::UnderWay, &|| until))?;
        self.try_out(until)
    }

    fn try_out(&self, until: Instant) -> Result<(), CommError> {
        let (shared, op) = (&*self.shared, "start");
        let (rank, size, cuda) = (shared.rank, shared.size, shared.lane.cuda());
        let rows = cuda.matrix(size, 1).map_err(shared.broken(op))?;
        let first_row = rows.extent(0, 1).map_err(shared.broken(op))?;
        let mut uneven = vec![1; size];
        uneven[size - 1] = 0;
        for counts in [vec![1; size], uneven] {
            let transfers = transfers::all_gather(rank, &counts, &[first_row]);
            // SAFETY: (1) the matrix has a row for every rank, and is kept until the device has passed the mark below.
            let mark = unsafe { shared.issue(op, &transfers, &|| until) }?;
            shared.wait_for(op, &mark, &|| until)?;
        }
        match &shared.peers {
            Some(peers) => combining::try_out(shared, peers, until),
            None => Ok(()),
        }
    }

    /// The ends of a group that is connected begin to watch.
    fn with_watch(mut self) -> Result<Self, CommError> {
        let shared = self.shared.clone();
        let name = format!("apbd-nccl-{}", shared.rank);
        let watch = thread::Builder::new().name(name).spawn(move || watch::watch(&shared));
        self.watch = Some(watch.map_err(|error| CommError::Device { op: "start", reason: error.to_string() })?);
        Ok(self)
    }

    /// The rank's device.
    pub fn device(&self) -> &Arc<Cuda> {
        self.shared.lane.cuda()
    }

    /// Waits on the host until the device has passed every collective that was started. Tells what went wrong with them, if anything did.
    pub fn settle(&self) -> Result<(), CommError> {
        let shared = &*self.shared;
        loop {
            let oldest = shared.lock_under_way().front().map(|oldest| (oldest.op, oldest.mark.clone(), oldest.since));
            let Some((op, mark, since)) = oldest else { return shared.check() };
            shared.wait_for(op, &mark, &|| shared.until(since))?;
            shared.lock_under_way().retain(|other| !Arc::ptr_eq(&other.mark, &mark));
        }
    }

    /// Comes to the next round with what this call is; whoever comes last compares.
    fn join(&self, call: Call) -> Result<(), CommError> {
        let round = self.started.fetch_add(1, Ordering::Relaxed);
        self.shared.own(self.shared.meeting.join(round, self.shared.rank, call))
    }

    /// A collective that carries one word, awaited.
    fn exchange(&self, call: Call, value: u64) -> Result<Vec<Deposit>, CommError> {
        let (round, op) = (self.started.fetch_add(1, Ordering::Relaxed), call.op());
        let Shared { meeting, rank, .. } = &*self.shared;
        let deposit = Deposit { call, rows: Arc::default(), value };
        let taken = meeting.deposit(round, *rank, deposit).and_then(|()| meeting.take(round, *rank, op));
        self.shared.own(taken)
    }

    /// Starts `transfers` on matrices that are kept until they are done: `rows` for the caller, `sent` for the transfers alone.
    fn start<const N: usize>(
        &self,
        call: Call,
        transfers: &[Transfer],
        rows: [CudaMatrix; N],
        sent: Option<[CudaMatrix; N]>,
    ) -> Result<Pending<N>, CommError> {
        let op = call.op();
        self.join(call)?;
        // SAFETY: (1) the matrices are kept in what is returned, until the device's computing waits for the mark.
        let mark = unsafe { self.shared.start(op, transfers) };
        match mark {
            Ok(mark) => Ok(Pending { shared: self.shared.clone(), mark, rows: Some(rows), sent }),
            Err(error) => {
                self.shared.give_up();
                Err(error)
            }
        }
    }

    /// For a call that is wrong by itself the other ranks would wait in vain, so it ends the communicator.
    fn checked(&self, call: Result<Call, Unfit>) -> Result<Call, CommError> {
        call.map_err(|unfit| {
            let error = unfit.on(self.shared.rank);
            let _ = self.shared.meeting.fail(self.shared.rank, &error);
            error
        })
    }
}

impl<const N: usize> Pending<N> {
    /// Makes what is computed from here on wait for the collective.
    fn rejoin(&self) -> Result<(), CommError> {
        self.shared.lane.rejoin(&self.mark).map_err(device_error("finish"))
    }

    /// What was received and what was sent.
    fn finish(mut self) -> Result<([CudaMatrix; N], Option<[CudaMatrix; N]>), CommError> {
        self.rejoin()?;
        let rows = self.rows.take().expect("taken once");
        self.shared.check()?;
        Ok((rows, self.sent.take()))
    }
}

impl<const N: usize> Drop for Pending<N> {
    fn drop(&mut self) {
        // Not finished: the matrices are about to be given back. Should this fail, the device does no more work at all.
        if self.rows.is_some() {
            let _ = self.rejoin();
        }
    }
}

impl Comm<CudaMatrix, CudaScores> for NcclComm {
    type Pending<const N: usize> = Pending<N>;
    type Exchange<const N: usize> = Pending<N>;

    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn all_gather<const N: usize>(&self, rows: [CudaMatrix; N], counts: &[usize]) -> Result<Pending<N>, CommError> {
        let call = self.checked(Call::all_gather(self.shared.size, &rows.each_ref().map(dimensions), counts))?;
        let places = places(&rows).map_err(device_error(call.op()))?;
        self.start(call, &transfers::all_gather(self.shared.rank, counts, &places), rows, None)
    }

    fn all_to_all<const N: usize>(
        &self,
        send: [CudaMatrix; N],
        send_counts: &[usize],
        receive: [CudaMatrix; N],
        receive_counts: &[usize],
    ) -> Result<Pending<N>, CommError> {
        let [from, to] = [&send, &receive].map(|matrices| matrices.each_ref().map(dimensions));
        let call = Call::all_to_all(self.shared.size, (&from, send_counts), (&to, receive_counts));
        let call = self.checked(call)?;
        let [from, to] = [&send, &receive].map(|matrices| places(matrices).map_err(device_error(call.op())));
        let transfers = transfers::all_to_all(self.shared.rank, (&from?, send_counts), (&to?, receive_counts));
        self.start(call, &transfers, receive, Some(send))
    }

    fn finish_all_to_all<const N: usize>(
        &self,
        exchange: Pending<N>,
    ) -> Result<([CudaMatrix; N], [CudaMatrix; N]), CommError> {
        let (received, sent) = exchange.finish()?;
        Ok((sent.expect("an all-to-all sends from matrices of its own"), received))
    }

    fn finish<const N: usize>(&self, pending: Pending<N>) -> Result<[CudaMatrix; N], CommError> {
        pending.finish().map(|(rows, _)| rows)
    }

    fn all_gather_partials(
        &self,
        partials: Partials<'_, CudaMatrix, CudaScores>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        let size = |scores: &CudaScores| (scores.rows(), scores.cols());
        let (sizes, places) = match &partials {
            Partials::Attention(parts, lse) => {
                (vec![dimensions(parts), size(lse)], vec![parts.extent(0, 1), lse.extent(0, 1)])
            }
            Partials::Sums(scores) | Partials::Columns(scores) => (vec![size(scores)], vec![scores.extent(0, 1)]),
        };
        let call = self.checked(Call::all_gather_partials(self.shared.size, &sizes, counts))?;
        let op = call.op();
        let places = places.into_iter().collect::<Result<Vec<_>, _>>().map_err(device_error(op))?;
        let transfers = transfers::all_gather(self.shared.rank, counts, &places);
        self.join(call)?;
        // SAFETY: (1) they are borrowed.
        unsafe { self.shared.compute(op, &transfers) }.inspect_err(|_| self.shared.give_up())?;
        self.shared.check()
    }

    fn combining(&self, rows: usize, width: usize) -> Option<&dyn Combining<CudaMatrix, CudaScores>> {
        let takes = self.shared.peers.as_ref().is_some_and(|peers| peers.takes(rows, width));
        takes.then_some(self as &dyn Combining<_, _>)
    }

    fn broadcast(&self, root: usize, value: u64) -> Result<u64, CommError> {
        let call = self.checked(Call::broadcast(self.shared.size, root))?;
        Ok(self.exchange(call, value)?[root].value)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(Call::Barrier, 0).map(drop)
    }

    fn come_further(&self) {
        self.shared.meeting.come_further();
    }

    fn check(&self) -> Result<(), CommError> {
        self.shared.check()
    }

    fn abort(&self, reason: &str) {
        self.shared.meeting.abort(self.shared.rank, reason);
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        // Peers may still need what this rank has promised them; one that fails meanwhile ends the wait.
        if !thread::panicking() {
            let _ = self.settle();
        }
        self.shared.closing.store(true, Ordering::Release);
        self.shared.meeting.leave(self.shared.rank);
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
        self.shared.abort_device();
    }
}
