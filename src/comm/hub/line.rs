//! A rank's line to the hub on the first node, and a node's line for its orders.
//!
//! Invariant: a line that is broken, or on which nothing is heard for too long, is the end of the communicator for this rank.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{self, End, Say, Seat, Tell};
use super::{BEAT, Place, SILENCE};
use crate::comm::CommError;
#[cfg(feature = "cuda")]
use crate::comm::call::Call;
use crate::comm::rounds::Deposit;

/// Time between two tries to reach a hub that is not there yet.
const AGAIN: Duration = Duration::from_millis(100);

/// A rank's line.
pub(in crate::comm) struct Line {
    rank: usize,
    deadline: Duration,
    stream: TcpStream,
    saying: Mutex<TcpStream>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    taken: HashMap<u64, Vec<Deposit>>,
    /// When a rank has last come further, as far as has been heard.
    progress: Instant,
    /// How the communicator ended, in the words in which this rank has to be told first.
    first: Option<End>,
    ended: Option<CommError>,
    left: bool,
}

impl Line {
    /// Takes a rank's seat at the hub, and waits until all others have theirs. Gives the group's secret too.
    pub fn open(
        place: &Place,
        rank: usize,
        size: usize,
        deadline: Duration,
    ) -> Result<(Arc<Self>, Vec<u8>), CommError> {
        let refused = |reason: String| CommError::Device { op: "rendezvous", reason };
        let (stream, secret) = sit_down(place, Seat::Rank(rank), size).map_err(refused)?;
        let clone = || stream.try_clone().map_err(|error| refused(error.to_string()));
        let (saying, heard) = (Mutex::new(clone()?), clone()?);
        let state = Mutex::new(State::new());
        let line = Arc::new(Self { rank, deadline, stream, saying, state, changed: Condvar::new() });
        let (listener, beater) = (line.clone(), Arc::downgrade(&line));
        let named = |what: &str| thread::Builder::new().name(format!("apbd-line-{what}-{rank}"));
        // Both end with the line: dropping it shuts the connection down.
        let spawned = named("ear").spawn(move || listener.hear(heard)).and_then(|_| {
            named("beat").spawn(move || {
                while let Some(line) = beater.upgrade().filter(|line| !line.lock().left) {
                    line.say(&Say::Beat, &[]);
                    drop(line);
                    thread::sleep(BEAT);
                }
            })
        });
        spawned.map_err(|error| refused(error.to_string()))?;
        Ok((line, secret))
    }

    /// Comes to a round; [`Line::take`] waits for the others.
    pub fn deposit(&self, round: u64, deposit: Deposit) -> Result<(), CommError> {
        self.check(deposit.call.op())?;
        let Deposit { call, rows, value } = deposit;
        self.say(&Say::Deposit { round, call, value, awaited: true }, &[&rows]);
        Ok(())
    }

    /// Comes to a round from which nobody takes anything.
    #[cfg(feature = "cuda")]
    pub fn join(&self, round: u64, call: Call) -> Result<(), CommError> {
        self.check(call.op())?;
        self.say(&Say::Deposit { round, call, value: 0, awaited: false }, &[]);
        Ok(())
    }

    /// Waits for what all have brought to a round.
    pub fn take(&self, round: u64, op: &'static str) -> Result<Vec<Deposit>, CommError> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(deposits) = state.taken.remove(&round) {
                return Ok(deposits);
            }
            state.check(op, self.rank)?;
            // The hub keeps the deadline; beyond it there is no hub.
            let until = began.max(state.progress) + self.deadline + SILENCE;
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                state.end(End::Failed { reason: "the first node does not answer".to_owned() }, self.rank);
                continue;
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// As the rounds' own.
    pub fn come_further(&self) {
        self.say(&Say::Further, &[]);
    }

    /// As the rounds' own.
    #[cfg(feature = "cuda")]
    pub fn progress(&self) -> Instant {
        self.lock().progress
    }

    /// Gives up, for all ranks.
    pub fn abort(&self, reason: &str) {
        let mut state = self.lock();
        if state.ended.is_none() {
            state.ended = Some(CommError::Aborted { rank: self.rank, reason: reason.to_owned() });
            drop(state);
            self.say(&Say::Abort { reason: reason.to_owned() }, &[]);
            self.changed.notify_all();
        }
    }

    /// As the rounds' own.
    pub fn ended(&self, wait: Duration) -> Option<CommError> {
        let mut state = self.lock();
        if state.ended.is_none() && !wait.is_zero() {
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.ended.clone()
    }

    /// As the rounds' own.
    #[cfg(feature = "cuda")]
    pub fn fail(&self, error: &CommError) -> bool {
        let is_first = self.lock().ended.is_none();
        self.abort(&error.to_string());
        is_first
    }

    /// The rank has done its work.
    pub fn leave(&self) {
        self.lock().left = true;
        self.say(&Say::Leave, &[]);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn check(&self, op: &'static str) -> Result<(), CommError> {
        self.lock().check(op, self.rank)
    }

    fn say(&self, say: &Say, rows: &[&[f32]]) {
        let mut stream = self.saying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = wire::write(&mut *stream, say, rows) {
            let mut state = self.lock();
            if !state.left {
                state.end(
                    End::Failed { reason: format!("the connection to the first node was lost: {error}") },
                    self.rank,
                );
                self.changed.notify_all();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, mut stream: TcpStream) {
        loop {
            let heard = wire::read::<Tell>(&mut stream);
            let mut state = self.lock();
            match heard {
                Ok((Tell::Taken { round, deposits }, rows)) => match wire::deposits(deposits, rows) {
                    Some(deposits) => {
                        state.taken.insert(round, deposits);
                    }
                    None => state.end(End::Failed { reason: "the hub sent too few rows".to_owned() }, self.rank),
                },
                Ok((Tell::Ended { end }, _)) => state.end(end, self.rank),
                Ok((Tell::Quiet { ms }, _)) => {
                    let came = Instant::now().checked_sub(Duration::from_millis(ms));
                    state.progress = came.map_or(state.progress, |came| state.progress.max(came));
                    continue;
                }
                Ok(_) => state.end(End::Failed { reason: "the hub is not understood".to_owned() }, self.rank),
                Err(error) => {
                    let reason = match error.kind() {
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                            format!("nothing was heard of the first node for {} s", SILENCE.as_secs())
                        }
                        _ => "the connection to the first node was lost".to_owned(),
                    };
                    if !state.left {
                        state.end(End::Failed { reason }, self.rank);
                    }
                    self.changed.notify_all();
                    return;
                }
            }
            self.changed.notify_all();
        }
    }
}

impl State {
    fn new() -> Self {
        Self { taken: HashMap::new(), progress: Instant::now(), first: None, ended: None, left: false }
    }

    /// The communicator is over; what comes after the first telling of why is its echo.
    fn end(&mut self, end: End, rank: usize) {
        if self.ended.is_none() {
            self.ended = Some(match end.clone() {
                End::Aborted { rank, reason } => CommError::Aborted { rank, reason },
                own => CommError::Aborted { rank, reason: own.error("communicator", rank).to_string() },
            });
            self.first = Some(end);
        }
    }

    fn check(&mut self, op: &'static str, rank: usize) -> Result<(), CommError> {
        match (self.first.take(), &self.ended) {
            (Some(first), _) => Err(first.error(op, rank)),
            (None, Some(ended)) => Err(ended.clone()),
            (None, None) => Ok(()),
        }
    }
}

/// What a node is told to do, in the order in which the first node decides it.
pub struct Told(TcpStream);

/// What a node hears of the first one.
pub enum Heard {
    /// The next order.
    Order(serde_json::Value),
    /// It is still there; every two seconds at least something is heard.
    Beat,
}

impl Told {
    /// Takes a node's seat.
    pub fn open(place: &Place, size: usize) -> Result<Self, CommError> {
        let refused = |reason: String| CommError::Device { op: "rendezvous", reason };
        Ok(Self(sit_down(place, Seat::Node(place.node), size).map_err(refused)?.0))
    }

    /// The next word; none when the first node has no more orders, or is gone.
    pub fn hear(&mut self) -> Option<Heard> {
        match wire::read::<Tell>(&mut self.0) {
            Ok((Tell::Order { order }, _)) => Some(Heard::Order(order)),
            Ok((Tell::Beat, _)) => Some(Heard::Beat),
            _ => None,
        }
    }
}

/// Connects to the hub and takes a seat. Waits until all others have theirs.
fn sit_down(place: &Place, seat: Seat, size: usize) -> Result<(TcpStream, Vec<u8>), String> {
    let until = Instant::now() + place.start;
    let mut stream = reach(place, until)?;
    let lost = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("the other nodes did not come within {} s", place.start.as_secs())
        }
        _ => format!("the connection to the first node at {} was lost: {error}", place.address),
    };
    let prepared = stream.set_nodelay(true).and_then(|()| stream.set_write_timeout(Some(SILENCE)));
    prepared.and_then(|()| stream.set_read_timeout(Some(place.start.max(SILENCE)))).map_err(lost)?;
    wire::write(&mut stream, &Say::Hello { token: place.token.clone(), seat, size }, &[]).map_err(lost)?;
    match wire::read::<Tell>(&mut stream).map_err(lost)?.0 {
        Tell::Welcome { secret } => {
            stream.set_read_timeout(Some(SILENCE)).map_err(lost)?;
            Ok((stream, secret))
        }
        Tell::Refused { reason } => Err(format!("the first node at {} refused: {reason}", place.address)),
        _ => Err(format!("what is at {} is no hub", place.address)),
    }
}

fn reach(place: &Place, until: Instant) -> Result<TcpStream, String> {
    loop {
        let tried = place.address.to_socket_addrs().and_then(|addresses| {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in addresses {
                match TcpStream::connect_timeout(&address, SILENCE.min(place.start)) {
                    // Of a port of this machine that nobody listens on, one may become the other side oneself.
                    Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {}
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        match tried {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > until => {
                let seconds = place.start.as_secs();
                return Err(format!("the first node at {} was not there within {seconds} s: {error}", place.address));
            }
            Err(_) => thread::sleep(AGAIN),
        }
    }
}
