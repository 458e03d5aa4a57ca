//! The hub: the rounds of all ranks, on the first node, with a seat for every rank of another node.
//!
//! Each seat has two threads: one hears what its rank says and brings it to the rounds, one takes from the rounds what the rank waits for.
//!
//! Invariant: a rank whose connection breaks, or that is silent for too long, ends the communicator for all.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::wire::{self, Say, Seat, Tell};
use super::{BEAT, Place, SILENCE};
use crate::comm::CommError;
use crate::comm::rounds::{Deposit, Rounds};

/// Time between two looks for somebody who comes, or for an end.
const LOOK: Duration = Duration::from_millis(10);

/// Names of the threads that hear a rank until it leaves begin so.
const HEARS: &str = "apbd-hears-";
/// How long the hub stays for ranks that have not left, where nothing went wrong.
const FAREWELL: Duration = Duration::from_secs(5);

/// The hub of one communicator, with everybody there.
pub struct Hub {
    rounds: Arc<Rounds>,
    nodes: Vec<Orders>,
    streams: Vec<TcpStream>,
    threads: Vec<JoinHandle<()>>,
}

/// What one of the other nodes is told to do.
pub struct Orders {
    node: usize,
    sender: Sender<serde_json::Value>,
}

impl Orders {
    /// Sends an order. `false` if the node is not there any more.
    pub fn send(&self, order: serde_json::Value) -> bool {
        self.sender.send(order).is_ok()
    }

    /// Which node.
    pub fn node(&self) -> usize {
        self.node
    }
}

/// Those who have come so far.
struct Guests {
    ranks: BTreeMap<usize, TcpStream>,
    nodes: BTreeMap<usize, TcpStream>,
}

impl Hub {
    /// Waits at the place until the ranks of all other nodes have come. `secret` is told to all of them.
    pub fn open(place: &Place, ranks: usize, deadline: Duration, secret: &[u8]) -> Result<Self, CommError> {
        let refused = |reason: String| CommError::Device { op: "rendezvous", reason };
        let listener = TcpListener::bind(&place.listen)
            .map_err(|error| refused(format!("{} can not be listened on: {error}", place.listen)))?;
        listener.set_nonblocking(true).map_err(|error| refused(error.to_string()))?;
        let guests = Guests { ranks: BTreeMap::new(), nodes: BTreeMap::new() };
        let guests = welcome(&listener, place, ranks, guests)?;
        Self::seat(guests, place, ranks, deadline, secret).map_err(|error| refused(error.to_string()))
    }

    fn seat(guests: Guests, place: &Place, ranks: usize, deadline: Duration, secret: &[u8]) -> io::Result<Self> {
        let rounds = Arc::new(Rounds::new(place.nodes * ranks, deadline));
        let mut hub = Self { rounds, nodes: Vec::new(), streams: Vec::new(), threads: Vec::new() };
        let welcome = Tell::Welcome { secret: secret.to_vec() };
        for (rank, mut stream) in guests.ranks {
            wire::write(&mut stream, &welcome, &[])?;
            hub.seat_rank(rank, stream)?;
        }
        for (node, mut stream) in guests.nodes {
            wire::write(&mut stream, &welcome, &[])?;
            hub.streams.push(stream.try_clone()?);
            let (sender, orders) = mpsc::channel();
            hub.nodes.push(Orders { node, sender });
            let name = format!("apbd-orders-{node}");
            hub.threads.push(thread::Builder::new().name(name).spawn(move || give_orders(stream, &orders))?);
        }
        Ok(hub)
    }

    fn seat_rank(&mut self, rank: usize, stream: TcpStream) -> io::Result<()> {
        let (heard, telling) = (stream.try_clone()?, Mutex::new(stream.try_clone()?));
        self.streams.push(stream);
        let (sender, awaited) = mpsc::channel();
        let rounds = self.rounds.clone();
        let hear = move || hear(heard, rank, &rounds, &sender);
        self.threads.push(thread::Builder::new().name(format!("{HEARS}{rank}")).spawn(hear)?);
        let rounds = self.rounds.clone();
        let tell = move || tell(&telling, rank, &rounds, &awaited);
        self.threads.push(thread::Builder::new().name(format!("apbd-tells-{rank}")).spawn(tell)?);
        Ok(())
    }

    /// Where the ranks of this node meet the others.
    pub(in crate::comm) fn rounds(&self) -> &Arc<Rounds> {
        &self.rounds
    }

    /// The other nodes; can be had once.
    pub fn take_orders(&mut self) -> Vec<Orders> {
        std::mem::take(&mut self.nodes)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.nodes.clear();
        // A rank that has not heard yet that the last barrier is passed would take the end for a failure.
        let until = Instant::now() + FAREWELL;
        let is_heard = |thread: &JoinHandle<()>| thread.thread().name().is_some_and(|name| name.starts_with(HEARS));
        while Instant::now() < until
            && self.rounds.ended(0, Duration::ZERO).is_none()
            && self.threads.iter().any(|thread| is_heard(thread) && !thread.is_finished())
        {
            thread::sleep(LOOK);
        }
        for stream in &self.streams {
            // Whoever hears nothing more knows that the hub has gone.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Lets in who has the token and a seat, until all seats are taken.
fn welcome(listener: &TcpListener, place: &Place, ranks: usize, mut guests: Guests) -> Result<Guests, CommError> {
    let until = Instant::now() + place.start;
    let (others, nodes) = ((place.nodes - 1) * ranks, place.nodes - 1);
    let (sender, comes) = mpsc::channel();
    while guests.ranks.len() < others || guests.nodes.len() < nodes {
        if let Ok((stream, _)) = listener.accept() {
            // One who says nothing does not keep the others waiting.
            let (sender, token, size) = (sender.clone(), place.token.clone(), place.nodes * ranks);
            let asked = thread::Builder::new().name("apbd-door".to_owned()).spawn(move || {
                let seat = ask(&stream, &token, size);
                let _ = sender.send((seat, stream));
            });
            asked.map_err(|error| CommError::Device { op: "rendezvous", reason: error.to_string() })?;
        }
        match comes.recv_timeout(LOOK) {
            Ok((Ok(seat), stream)) => guests.admit(seat, stream, place, ranks),
            Ok((Err(reason), mut stream)) => {
                let _ = wire::write(&mut stream, &Tell::Refused { reason }, &[]);
            }
            Err(_) => {}
        }
        if Instant::now() > until {
            return Err(CommError::Device { op: "rendezvous", reason: guests.missing(place, ranks) });
        }
    }
    Ok(guests)
}

/// Which seat somebody wants.
fn ask(stream: &TcpStream, token: &str, size: usize) -> Result<Seat, String> {
    let unheard = |error: io::Error| format!("what was said was not understood: {error}");
    stream.set_nonblocking(false).map_err(unheard)?;
    stream.set_nodelay(true).map_err(unheard)?;
    stream.set_read_timeout(Some(SILENCE)).map_err(unheard)?;
    stream.set_write_timeout(Some(SILENCE)).map_err(unheard)?;
    match wire::read::<Say>(&mut &*stream).map_err(unheard)?.0 {
        Say::Hello { token: given, .. } if given != token => {
            Err("the token is another group's, or an old one".to_owned())
        }
        Say::Hello { size: counted, .. } if counted != size => {
            Err(format!("the nodes disagree: {counted} ranks in all on one, {size} on the first"))
        }
        Say::Hello { seat, .. } => Ok(seat),
        _ => Err("the first word has to be hello".to_owned()),
    }
}

impl Guests {
    /// A seat that is not there or taken is refused; who comes again, after a broken connection, takes the place of who was before.
    fn admit(&mut self, seat: Seat, mut stream: TcpStream, place: &Place, ranks: usize) {
        let is_free = match seat {
            Seat::Rank(rank) => (ranks..place.nodes * ranks).contains(&rank),
            Seat::Node(node) => (1..place.nodes).contains(&node),
        };
        if !is_free {
            let _ =
                wire::write(&mut stream, &Tell::Refused { reason: format!("{seat:?} is no seat of the group") }, &[]);
            return;
        }
        match seat {
            Seat::Rank(rank) => self.ranks.insert(rank, stream),
            Seat::Node(node) => self.nodes.insert(node, stream),
        };
    }

    /// Who has not come.
    fn missing(&self, place: &Place, ranks: usize) -> String {
        let has_come = |node: usize| {
            self.nodes.contains_key(&node) && (node * ranks..(node + 1) * ranks).all(|r| self.ranks.contains_key(&r))
        };
        let missing: Vec<String> =
            (1..place.nodes).filter(|node| !has_come(*node)).map(|node| node.to_string()).collect();
        let seconds = place.start.as_secs();
        format!("of {} nodes number {} did not come within {seconds} s", place.nodes, missing.join(", "))
    }
}

/// Brings what a rank says to the rounds.
fn hear(mut stream: TcpStream, rank: usize, rounds: &Rounds, awaited: &Sender<(u64, &'static str)>) {
    let reason = loop {
        match wire::read::<Say>(&mut stream) {
            Ok((Say::Deposit { round, call, value, awaited: is_awaited }, rows)) => {
                let op = call.op();
                let came = match is_awaited {
                    true => rounds.deposit(round, rank, Deposit { call, rows: Arc::new(rows), value }),
                    false => rounds.join(round, rank, call),
                };
                // The end of the communicator is told by the other thread, also to those who await nothing.
                if (is_awaited || came.is_err()) && awaited.send((round, op)).is_err() {
                    break "its node does not listen".to_owned();
                }
            }
            Ok((Say::Further, _)) => rounds.come_further(),
            Ok((Say::Abort { reason }, _)) => break reason,
            Ok((Say::Leave, _)) => {
                rounds.leave(rank);
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
            Ok((Say::Beat, _)) => {}
            Ok((Say::Hello { .. }, _)) => break "its node said hello twice".to_owned(),
            Err(error) if is_silence(&error) => {
                break format!("nothing was heard of its node for {} s", SILENCE.as_secs());
            }
            Err(_) => break "the connection to its node was lost".to_owned(),
        }
    };
    rounds.abort(rank, &reason);
    rounds.leave(rank);
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Tells a rank what it waits for, the end of the communicator once, and now and then that the hub is there.
fn tell(stream: &Mutex<TcpStream>, rank: usize, rounds: &Rounds, awaited: &Receiver<(u64, &'static str)>) {
    let say = |tell: &Tell, rows: &[&[f32]]| {
        wire::write(&mut *stream.lock().unwrap_or_else(PoisonError::into_inner), tell, rows).is_ok()
    };
    let beat = || say(&Tell::Quiet { ms: rounds.progress().elapsed().as_millis() as u64 }, &[]);
    // That it is not heard is noticed by what is said next.
    let still_here = || {
        let _ = beat();
    };
    let (mut is_over, mut said) = (false, Instant::now());
    loop {
        let heard = match awaited.recv_timeout(LOOK) {
            // Others may be a layer behind for longer than silence is borne: the rank that waits for them still hears of the hub.
            Ok((round, op)) => match rounds.take_meanwhile(round, rank, op, BEAT, still_here) {
                Ok(deposits) => {
                    let (deposits, rows) = wire::brought(&deposits);
                    say(&Tell::Taken { round, deposits }, &rows)
                }
                Err(error) => {
                    is_over = true;
                    say(&Tell::Ended { end: error.into() }, &[])
                }
            },
            Err(RecvTimeoutError::Timeout) => match rounds.ended(rank, Duration::ZERO) {
                Some(error) if !is_over => {
                    is_over = true;
                    say(&Tell::Ended { end: error.into() }, &[])
                }
                _ if said.elapsed() > BEAT => beat(),
                _ => continue,
            },
            Err(RecvTimeoutError::Disconnected) => return,
        };
        said = Instant::now();
        if !heard {
            return;
        }
    }
}

/// Passes orders on to a node until there are none any more.
fn give_orders(mut stream: TcpStream, orders: &Receiver<serde_json::Value>) {
    loop {
        let tell = match orders.recv_timeout(BEAT) {
            Ok(order) => Tell::Order { order },
            Err(RecvTimeoutError::Timeout) => Tell::Beat,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if wire::write(&mut stream, &tell, &[]).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}
