//! Partial results of several devices that become one on each of them, by the devices' own writes into each other's memory: a library's collective takes
//! tens of microseconds, however little it carries.
//!
//! Invariant: a mailbox is freed when no device writes to it any more; every rank asks for the same turns in the same order.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Cuda;
use super::driver::{Context, Function, Pinned, Stream, parameters};
use super::matrix::{CudaMatrix, CudaScores, need, require};
use crate::{BackendError, HeadShape, even_part};

/// As in kernels/peers.cu.
const MOST_RANKS: usize = 8;
/// Of a line there, with eight bytes of data.
const LINE_BYTES: usize = 16;
const LINE_DATA_BYTES: usize = 8;
/// Lines of a rank in a turn: room for the sums of 32 rows of a hidden state of 8,192.
const SLOT_LINES: usize = (32 * 8192 * 4) / LINE_DATA_BYTES;
const THREADS: usize = 256;
/// So often, in turns, a mailbox is emptied: no line may be older than it takes numbers to go round.
const EMPTYING: u32 = 1 << 30;

/// Device memory that the other devices write to: the lines of two turns of all ranks.
struct Mailbox {
    context: Arc<Context>,
    at: u64,
    turn_bytes: usize,
}

impl Mailbox {
    fn new(cuda: &Cuda, ranks: usize) -> Result<Self, BackendError> {
        let turn_bytes = ranks * SLOT_LINES * LINE_BYTES;
        let mailbox = Self { context: cuda.context.clone(), at: cuda.context.allocate(2 * turn_bytes)?, turn_bytes };
        mailbox.empty(&cuda.stream, 0)?;
        mailbox.empty(&cuda.stream, 1)?;
        cuda.stream.synchronize("mailbox")?;
        Ok(mailbox)
    }

    /// Empties the place of a turn, in the order of a stream.
    fn empty(&self, stream: &Stream, turn: u32) -> Result<(), BackendError> {
        let place = self.at + u64::from(turn % 2) * self.turn_bytes as u64;
        // SAFETY: (1) it has two such places.
        unsafe { stream.fill("mailbox", place, 0, self.turn_bytes) }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // SAFETY: (1) from `allocate`; every rank has waited for its device before it let go of the mailboxes.
        unsafe { self.context.free(self.at) };
    }
}

/// One rank's end of a group of devices that reach into each other's memory.
pub struct Peers {
    cuda: Arc<Cuda>,
    mailboxes: Arc<Vec<Mailbox>>,
    /// What its kernels are told, but for the number of the turn.
    group: Group,
    /// Number of the last turn.
    turn: AtomicU32,
    /// A word that ends what the device waits for.
    ended: Pinned,
}

/// The number of the turn after that of another. It is never 0, which is in every line of an empty mailbox, and odd and even ones take turns, as their places do.
fn number_after(turn: u32) -> u32 {
    turn.checked_add(1).unwrap_or(2)
}

/// `Peers` of peers.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Group {
    mailboxes: [u64; MOST_RANKS],
    slot_lines: u64,
    ended: u64,
    turn: u32,
    rank: i32,
    ranks: i32,
}

impl Group {
    fn new(mailboxes: &[Mailbox], rank: usize, ended: u64) -> Self {
        let mut addresses = [0; MOST_RANKS];
        for (address, mailbox) in addresses.iter_mut().zip(mailboxes) {
            *address = mailbox.at;
        }
        let [rank, ranks] = [rank, mailboxes.len()].map(|n| n as i32);
        Self { mailboxes: addresses, slot_lines: SLOT_LINES as u64, ended, turn: 0, rank, ranks }
    }
}

impl Peers {
    /// The ends of a group, by rank; nothing where one of the devices does not reach another, or where there are too many.
    pub fn connect(devices: &[Arc<Cuda>]) -> Result<Option<Vec<Self>>, BackendError> {
        let ranks = devices.len();
        if ranks > MOST_RANKS {
            return Ok(None);
        }
        for from in devices {
            for to in devices.iter().filter(|to| !Arc::ptr_eq(from, to)) {
                if !from.context.reach(&to.context)? {
                    return Ok(None);
                }
            }
        }
        let mailboxes = devices.iter().map(|cuda| Mailbox::new(cuda, ranks)).collect::<Result<Vec<_>, _>>()?;
        let mailboxes = Arc::new(mailboxes);
        let end = |(rank, cuda): (usize, &Arc<Cuda>)| {
            let ended = Pinned::new(&cuda.context, size_of::<u32>())?;
            let group = Group::new(&mailboxes, rank, ended.address_on(&cuda.context)?);
            Ok(Self { cuda: cuda.clone(), mailboxes: mailboxes.clone(), group, turn: AtomicU32::new(0), ended })
        };
        devices.iter().enumerate().map(end).collect::<Result<_, _>>().map(Some)
    }

    /// Whether `rows` rows of `width` elements of partial results can be combined in a turn, be they sums or of attention.
    pub fn takes(&self, rows: usize, width: usize) -> bool {
        (rows * width * size_of::<f32>()).div_ceil(LINE_DATA_BYTES) <= SLOT_LINES
    }

    /// `x[i] += ` the sums of all ranks, in their order, for the first `rows` rows; `sums` are this rank's.
    pub fn add_sums(&self, rows: usize, sums: &CudaScores, x: &mut CudaMatrix) -> Result<(), BackendError> {
        let op = "add_sums";
        x.need(op, "x", rows, sums.cols)?;
        need(op, "sums", (rows, x.cols), (sums.rows, sums.cols))?;
        require(op, x.cols.is_multiple_of(2), "an even number of columns", x.cols)?;
        let elements = rows * x.cols;
        self.require_room(op, elements / 2)?;
        let (peers, count, from, to) = (self.next_turn()?, elements as i32, sums.row(0), x.row(0));
        // SAFETY: (1) parameters as in peers.cu; (2) matrices are borrowed.
        unsafe { self.launch(&self.cuda.functions.add_from_peers, elements / 2, parameters![peers, count, from, to]) }
    }

    /// Merges the partial attention results of all ranks, in their order: `rows` rows of this rank's are the first of `parts` and `lse`, and what comes of
    /// them goes to `out` from row `first` on.
    pub fn merge(
        &self,
        shape: HeadShape,
        rows: usize,
        (parts, lse): (&CudaMatrix, &CudaScores),
        (out, first): (&mut CudaMatrix, usize),
    ) -> Result<(), BackendError> {
        let (op, width) = ("merge_partials", shape.q_width());
        parts.need(op, "parts", rows, width)?;
        need(op, "lse", (rows, shape.heads), (lse.rows, lse.cols))?;
        out.need(op, "out", first + rows, width)?;
        require(op, shape.head_dim.is_multiple_of(4), "head_dim a multiple of 4", shape.head_dim)?;
        let lines = rows * width / 4;
        self.require_room(op, lines + rows * shape.heads)?;
        let (peers, from, from_lse, to) = (self.next_turn()?, parts.row(0), lse.row(0), out.row(first));
        let [rows, heads, head_dim] = [rows, shape.heads, shape.head_dim].map(|n| n as i32);
        let parameters = parameters![peers, rows, heads, head_dim, from, from_lse, to];
        // SAFETY: (1) parameters as in peers.cu; (2) matrices are borrowed.
        unsafe { self.launch(&self.cuda.functions.merge_from_peers, lines, parameters) }
    }

    /// Puts the columns of all ranks side by side in the first `rows` rows of `out`, see [`Backend::join_columns`](crate::Backend::join_columns): `part` has this
    /// rank's.
    pub fn join_columns(&self, rows: usize, part: &CudaScores, out: &mut CudaScores) -> Result<(), BackendError> {
        let (op, ranks, cols) = ("join_columns", self.mailboxes.len(), out.cols);
        let width = even_part(cols, self.rank(), ranks).len();
        need(op, "part", (rows, width), (part.rows, part.cols))?;
        need(op, "out", (rows, cols), (out.rows, out.cols))?;
        let lines = (rows * width).div_ceil(2);
        self.require_room(op, lines)?;
        let (peers, from, to) = (self.next_turn()?, part.row(0), out.row(0));
        let [rows, cols, width] = [rows, cols, width].map(|n| n as i32);
        let parameters = parameters![peers, rows, cols, width, from, to];
        // SAFETY: (1) parameters as in peers.cu; (2) matrices are borrowed.
        unsafe { self.launch(&self.cuda.functions.join_from_peers, lines, parameters) }
    }

    /// Lets the device go, wherever it waits for others: now and from here on. What it has then is no result.
    pub fn end(&self) {
        self.ended.word().store(1, Ordering::Release);
    }

    fn require_room(&self, op: &'static str, lines: usize) -> Result<(), BackendError> {
        require(op, lines <= SLOT_LINES, &format!("at most {SLOT_LINES} lines of {LINE_DATA_BYTES} bytes"), lines)
    }

    fn rank(&self) -> usize {
        self.group.rank as usize
    }

    fn next_turn(&self) -> Result<Group, BackendError> {
        let turn = number_after(self.turn.load(Ordering::Relaxed));
        self.turn.store(turn, Ordering::Relaxed);
        if turn % EMPTYING < 2 {
            // Nobody writes there before this rank has begun this turn, and of what it had from there it has made use.
            self.mailboxes[self.rank()].empty(&self.cuda.stream, turn + 1)?;
        }
        Ok(Group { turn, ..self.group })
    }

    /// Launches a kernel with a thread for each line, among the computing.
    ///
    /// # Safety
    /// As for [`Stream::launch`].
    unsafe fn launch(
        &self,
        function: &Function,
        lines: usize,
        parameters: &mut [*mut std::ffi::c_void],
    ) -> Result<(), BackendError> {
        self.cuda.mark(super::WAITING)?;
        // SAFETY: (1), (2) by the caller; mailboxes are kept until the device has passed the launch, see `drop`.
        unsafe { self.cuda.stream.launch(function, (lines.div_ceil(THREADS), 1, 1), THREADS, parameters) }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.end();
        // Until then the device may write to the others' mailboxes. There is nobody left to act on a failure.
        let _ = self.cuda.stream.synchronize("close");
    }
}

#[cfg(test)]
mod tests {
    use super::number_after;

    #[test]
    fn turns_take_turns_also_where_their_numbers_go_round() {
        for turn in [0, 1, u32::MAX - 2, u32::MAX - 1, u32::MAX] {
            let next = number_after(turn);
            assert!(next != 0 && next % 2 != turn % 2, "{next} after {turn}");
        }
    }
}
