//! Ranks on GPUs, joined by NCCL: one rank a device, any number of them in one process.
//!
//! Rows go from device to device on a stream of their own, beside the computing: a collective begins when what was computed before it is done, and
//! [`Comm::finish`] makes what is computed after it wait; the host waits for neither. Partial results, which all that follows needs, go in the order of the
//! computing itself: that spares them the changes of streams. What is not rows (a word, a barrier, whether the sizes agree) goes
//! through the ranks' common memory. A thread watches each rank, see [`watch`].
//!
//! Invariant: memory that a collective uses is not given back before the device's computing waits for that collective; a communicator that has failed is
//! never used again.
#![allow(unsafe_code)]

mod library;
mod transfers;
mod watch;

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub use library::{LIBRARY_VARIABLE, UniqueId, leave_multicast_off};

use super::call::{Call, Unfit};
use super::hub::{self, Met, Place, Side};
use super::meeting::Meeting;
use super::rounds::{Deposit, Rounds};
use super::{Comm, CommError};
use crate::backend::cuda::{Cuda, CudaMatrix, CudaScores, Extent, Lane, Mark};
use crate::backend::{Backend, BackendError};
use library::{Handle, Nccl, Progress, Transfer};

/// How long a wait that is expected to be short spins before it sleeps.
const SPIN: Duration = Duration::from_micros(300);
/// How long it sleeps at a time after that.
const NAP: Duration = Duration::from_micros(50);

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

/// What a rank shares with its watch.
struct Shared {
    rank: usize,
    size: usize,
    deadline: Duration,
    nccl: &'static Nccl,
    meeting: Meeting,
    /// Gone once aborted.
    handle: Mutex<Option<Handle>>,
    /// Collectives that the device may not have passed yet, in their order.
    under_way: Mutex<VecDeque<UnderWay>>,
    /// What this rank itself has met, until it is told to its caller.
    met: Mutex<Option<CommError>>,
    closing: AtomicBool,
    lane: Lane,
}

/// When a wait has lasted too long: asked again and again, because it may come to be later.
type Until<'a> = &'a dyn Fn() -> Instant;

struct UnderWay {
    op: &'static str,
    since: Instant,
    mark: Arc<Mark>,
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

fn device_error(op: &'static str) -> impl Fn(BackendError) -> CommError {
    move |error| CommError::Device { op, reason: error.to_string() }
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
        Self::start_all(id, (0, devices.len()), devices, meetings, deadlines)
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
        Ok((Self::start_all(id, ranks, devices, meetings, deadlines)?, side))
    }

    /// Ranks from `first` on, of `size` in all, begun together and then connected.
    fn start_all(
        id: UniqueId,
        (first, size): (usize, usize),
        devices: &[Arc<Cuda>],
        meetings: Vec<Meeting>,
        deadlines: Deadlines,
    ) -> Result<Vec<Self>, CommError> {
        let nccl = library::nccl().map_err(not_started)?;
        let mut ends = Vec::with_capacity(devices.len());
        for (index, (device, meeting)) in devices.iter().zip(meetings).enumerate() {
            ends.push(Self::begin(nccl, id, (first + index, size), device, meeting, deadlines)?);
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
        meeting: Meeting,
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
        Ok(())
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

impl Shared {
    fn lock_under_way(&self) -> MutexGuard<'_, VecDeque<UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until when a collective may last that was asked for at `since`.
    fn until(&self, since: Instant) -> Instant {
        since.max(self.meeting.progress()) + self.deadline
    }

    fn timed_out(&self, op: &'static str) -> CommError {
        CommError::TimedOut { op, rank: self.rank, seconds: self.deadline.as_secs() }
    }

    /// Ends the communicator because of what this rank has met. What its caller is to be told comes back: what ended it first.
    fn fail(&self, error: CommError) -> CommError {
        match self.meeting.fail(self.rank, &error) {
            true => error,
            false => self.check().err().unwrap_or(error),
        }
    }

    /// As [`Shared::fail`], for a device that failed in `op`.
    fn broken(&self, op: &'static str) -> impl Fn(BackendError) -> CommError {
        move |error| self.fail(device_error(op)(error))
    }

    /// As [`Shared::fail`], for what NCCL says of `op`.
    fn refused(&self, op: &'static str) -> impl Fn(String) -> CommError {
        move |reason| self.fail(CommError::Device { op, reason })
    }

    /// As [`Shared::fail`], with nobody there to be told: the caller learns it at its next call.
    fn fail_later(&self, error: CommError) {
        let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
        if self.meeting.fail(self.rank, &error) {
            *met = Some(error);
        }
    }

    /// That the communicator has ended, in the words of this rank where it was the one that ended it.
    fn own<T>(&self, result: Result<T, CommError>) -> Result<T, CommError> {
        result.map_err(|error| {
            let met = self.met.lock().unwrap_or_else(PoisonError::into_inner).take();
            met.unwrap_or(error)
        })
    }

    /// Whether the communicator still works.
    fn check(&self) -> Result<(), CommError> {
        self.own(self.meeting.ended(self.rank, Duration::ZERO).map_or(Ok(()), Err))
    }

    fn with_handle<T>(
        &self,
        op: &'static str,
        work: impl FnOnce(&Handle) -> Result<T, CommError>,
    ) -> Result<T, CommError> {
        match &*self.handle.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(handle) => work(handle),
            None => {
                self.check()?;
                Err(CommError::Device { op, reason: "the communicator has ended".to_owned() })
            }
        }
    }

    /// Lets the device go: what it does for the communicator stops where it is.
    fn abort_device(&self) {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            // Should it fail, the device stays where it is, and the process is the last word.
            let _ = self.lane.bind("abort");
            let _ = self.nccl.abort(handle);
        }
    }

    /// Starts a collective beside the computing, after what has been computed, and notes it for the watch.
    ///
    /// # Safety
    /// 1. What the transfers touch is this device's memory, and stays allocated until the device's computing waits for the lane.
    unsafe fn start(&self, op: &'static str, transfers: &[Transfer]) -> Result<Arc<Mark>, CommError> {
        let since = Instant::now();
        // SAFETY: (1) by the caller.
        let mark = unsafe { self.issue(op, transfers, &|| self.until(since)) }?;
        Ok(self.watched(op, since, mark))
    }

    /// Issues a collective among the computing, of which it takes its turn: for one that is awaited at once anyway.
    ///
    /// # Safety
    /// 1. What the transfers touch is this device's memory, allocated now.
    unsafe fn compute(&self, op: &'static str, transfers: &[Transfer]) -> Result<(), CommError> {
        let since = Instant::now();
        self.lane.bind(op).map_err(self.broken(op))?;
        let computing = self.lane.computing().map_err(self.broken(op))?;
        // SAFETY: (1) by the caller, and memory is given back in the order of the computing; (2) the stream is the device's, which is current.
        unsafe { self.transfer(op, transfers, computing, &|| self.until(since)) }?;
        self.watched(op, since, self.lane.mark_computing().map_err(self.broken(op))?);
        Ok(())
    }

    fn watched(&self, op: &'static str, since: Instant, mark: Mark) -> Arc<Mark> {
        let mark = Arc::new(mark);
        self.lock_under_way().push_back(UnderWay { op, since, mark: mark.clone() });
        mark
    }

    /// Issues transfers on the lane, after what has been computed.
    ///
    /// # Safety
    /// As for [`Shared::start`].
    unsafe fn issue(&self, op: &'static str, transfers: &[Transfer], until: Until<'_>) -> Result<Mark, CommError> {
        self.lane.follow(op).map_err(self.broken(op))?;
        // SAFETY: (1) by the caller; (2) the lane is of the rank's device, which `follow` has made current.
        unsafe { self.transfer(op, transfers, self.lane.raw(), until) }?;
        self.lane.mark().map_err(self.broken(op))
    }

    /// # Safety
    /// As for [`Nccl::transfer`].
    unsafe fn transfer(
        &self,
        op: &'static str,
        transfers: &[Transfer],
        stream: *mut c_void,
        until: Until<'_>,
    ) -> Result<(), CommError> {
        if transfers.is_empty() {
            return Ok(());
        }
        self.with_handle(op, |handle| {
            // SAFETY: (1), (2) by the caller.
            let begun = unsafe { self.nccl.transfer(handle, transfers, stream) };
            self.issued(op, handle, begun.map_err(self.refused(op))?, until)
        })
    }

    /// Waits until what was begun has been issued to the device, which is usually at once.
    fn issued(
        &self,
        op: &'static str,
        handle: &Handle,
        mut progress: Progress,
        until: Until<'_>,
    ) -> Result<(), CommError> {
        let begun = Instant::now();
        while progress == Progress::UnderWay {
            self.pause(op, begun, until)?;
            progress = self.nccl.poll(handle).map_err(self.refused(op))?;
        }
        Ok(())
    }

    /// Waits on the host until the device has passed a mark.
    fn wait_for(&self, op: &'static str, mark: &Mark, until: Until<'_>) -> Result<(), CommError> {
        let begun = Instant::now();
        while !mark.has_passed().map_err(self.broken(op))? {
            self.pause(op, begun, until)?;
        }
        // What an aborted collective left is no result.
        self.check()
    }

    /// One turn of a wait that began at `begun`: ends it if the communicator has ended, or at `until`.
    fn pause(&self, op: &'static str, begun: Instant, until: Until<'_>) -> Result<(), CommError> {
        self.check()?;
        if Instant::now() >= until() {
            return Err(self.fail(self.timed_out(op)));
        }
        match begun.elapsed() < SPIN {
            true => thread::yield_now(),
            false => thread::sleep(NAP),
        }
        Ok(())
    }

    /// After a collective that could not be issued whole: its memory is about to be given back, and part of it may be under way.
    fn give_up(&self) {
        self.abort_device();
        if let Ok(mark) = self.lane.mark() {
            // A device that takes no more work does none on that memory either.
            let _ = self.lane.rejoin(&mark);
        }
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
        parts: &mut CudaMatrix,
        lse: &mut CudaScores,
        counts: &[usize],
    ) -> Result<(), CommError> {
        let both = [dimensions(parts), (lse.rows(), lse.cols())];
        let call = self.checked(Call::all_gather_partials(self.shared.size, &both, counts))?;
        let op = call.op();
        let [parts, lse] = [parts.extent(0, 1), lse.extent(0, 1)].map(|place| place.map_err(device_error(op)));
        let transfers = transfers::all_gather(self.shared.rank, counts, &[parts?, lse?]);
        self.join(call)?;
        // SAFETY: (1) both are borrowed.
        unsafe { self.shared.compute(op, &transfers) }.inspect_err(|_| self.shared.give_up())?;
        self.shared.check()
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
