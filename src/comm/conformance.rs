//! What every communicator has to do, as tests generic over how its ranks come to be.
//!
//! Values are small whole numbers, exact in every compute type. Delays are random but results must not depend on them.
//!
//! The tests of the CUDA backend take this file in too, for the communicator between GPUs.
//!
//! Invariant: every test ends, whatever the communicator does, because every group has a deadline.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Comm, CommError, Partials};

/// Longer than any test takes.
pub const PATIENT: Duration = Duration::from_secs(60);
const HASTY: Duration = Duration::from_millis(50);

/// A communicator under test, with the means to write and read its matrices.
pub trait Ranks: Sync {
    type M: Send;
    type S: Send;
    type C: Comm<Self::M, Self::S>;

    /// The ends of a fresh communicator, by rank.
    fn group(&self, size: usize, deadline: Duration) -> Vec<Self::C>;
    fn matrix(&self, comm: &Self::C, rows: usize, cols: usize, values: &[f32]) -> Self::M;
    fn scores(&self, comm: &Self::C, rows: usize, cols: usize, values: &[f32]) -> Self::S;
    fn matrix_values(&self, comm: &Self::C, matrix: &Self::M) -> Vec<f32>;
    fn scores_values(&self, comm: &Self::C, scores: &Self::S) -> Vec<f32>;
    /// Waits until what was finished is there, on a device that does it later. Tells what went wrong with it meanwhile.
    fn settle(&self, comm: &Self::C) -> Result<(), CommError>;
    /// Ranks that there can be at most.
    fn most(&self) -> usize {
        usize::MAX
    }
}

/// Gives `$then!` the functions of the suite, each with the ranks without which it says nothing.
macro_rules! with_functions {
    ($then:ident) => {
        $then! {
            all_gather_puts_the_rows_of_every_rank_in_order: 1,
            all_gather_of_partial_results_puts_the_rows_of_every_rank_in_order: 1,
            a_full_turn_of_the_ring_brings_everything_to_everybody: 1,
            an_all_to_all_brings_every_rank_what_the_others_have_for_it: 1,
            collectives_in_flight_together_keep_apart: 2,
            broadcast_gives_every_rank_the_value_of_the_root: 1,
            nobody_passes_a_barrier_before_all_have_come: 2,
            random_collectives_with_random_delays_agree_with_their_definition: 1,
            an_abort_ends_every_collective_on_every_rank: 2,
            the_first_reason_of_an_abort_is_kept: 1,
            a_rank_that_dies_ends_every_collective_of_the_others: 2,
            a_rank_that_never_comes_ends_the_wait_of_the_others: 2,
            a_rank_that_comes_further_is_waited_for_beyond_the_deadline: 2,
            ranks_that_disagree_are_told_so: 3,
            sizes_wrong_by_themselves_are_refused: 2,
        }
    };
}

macro_rules! listed {
    ($($test:ident: $needed:literal,)*) => {
        /// The suite: name, ranks without which the test says nothing, test.
        // Of this list and the macro above, each crate that has this file uses one.
        #[allow(dead_code, clippy::type_complexity)]
        pub fn tests<R: Ranks>() -> Vec<(&'static str, usize, fn(&R))> {
            vec![$((stringify!($test), $needed, $test)),*]
        }
    };
}
with_functions!(listed);
#[allow(unused_imports)]
pub(crate) use with_functions;

#[derive(Debug, Clone, Copy)]
enum Op {
    AllGather,
    Partials,
    Rotate,
    AllToAll,
    Broadcast,
    Barrier,
}
/// What a rank, whose number is the last argument, does.
type Body<R> = fn(&R, &<R as Ranks>::C, usize) -> Result<(), CommError>;

const OPS: [Op; 6] = [Op::AllGather, Op::Partials, Op::Rotate, Op::AllToAll, Op::Broadcast, Op::Barrier];

/// Runs `body` on every rank, each on its own thread, and returns what they returned; nothing if there can not be so many ranks.
fn on_all<R: Ranks, T: Send>(
    ranks: &R,
    size: usize,
    deadline: Duration,
    body: impl Fn(usize, R::C) -> T + Sync,
) -> Vec<T> {
    if size > ranks.most() {
        return Vec::new();
    }
    let body = &body;
    std::thread::scope(|scope| {
        let ends = ranks.group(size, deadline).into_iter().enumerate();
        let threads: Vec<_> = ends.map(|(rank, comm)| scope.spawn(move || body(rank, comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}

/// The value that rank `rank` puts at element `i` in its `turn`-th collective.
fn value(turn: usize, rank: usize, i: usize) -> f32 {
    ((turn * 31 + rank * 17 + i * 3) % 251) as f32
}

/// What an all-gather has to bring, and where `rank`'s own part of it lies.
fn gathered(turn: usize, counts: &[usize], cols: usize) -> Vec<f32> {
    let of_rank = |(rank, count): (usize, &usize)| (0..count * cols).map(move |i| value(turn, rank, i));
    counts.iter().enumerate().flat_map(of_rank).collect()
}

/// The same with everything but `rank`'s rows spoilt, and a spare row at the end that nobody may touch.
fn before_gather(turn: usize, rank: usize, counts: &[usize], cols: usize) -> Vec<f32> {
    let mut values = gathered(turn, counts, cols);
    let first = counts[..rank].iter().sum::<usize>() * cols;
    let own = first..first + counts[rank] * cols;
    values.iter_mut().enumerate().filter(|(i, _)| !own.contains(i)).for_each(|(_, v)| *v = -1.0);
    values.extend(std::iter::repeat_n(7.0, cols));
    values
}

fn check_gathered(rank: usize, values: &[f32], turn: usize, counts: &[usize], cols: usize) {
    let (taken, spare) = values.split_at(counts.iter().sum::<usize>() * cols);
    assert_eq!(taken, gathered(turn, counts, cols), "rank {rank}");
    assert!(spare.iter().all(|&v| v == 7.0), "rows beyond the counts were written: {spare:?}");
}

/// One matrix, and two of different widths that go together.
fn check_all_gather<R: Ranks>(ranks: &R, comm: &R::C, turn: usize, counts: &[usize], cols: usize) {
    let (rank, rows) = (comm.rank(), counts.iter().sum::<usize>() + 1);
    let matrix = |turn, cols| ranks.matrix(comm, rows, cols, &before_gather(turn, rank, counts, cols));
    let alone = comm.all_gather([matrix(turn, cols)], counts).and_then(|pending| comm.finish(pending));
    let both = [matrix(turn + 1, 2 * cols), matrix(turn + 2, cols)];
    let both = comm.all_gather(both, counts).and_then(|pending| comm.finish(pending));
    let ([alone], [wide, narrow]) = (alone.expect("all-gather"), both.expect("all-gather of two"));
    for (matrix, turn, cols) in [(alone, turn, cols), (wide, turn + 1, 2 * cols), (narrow, turn + 2, cols)] {
        check_gathered(rank, &ranks.matrix_values(comm, &matrix), turn, counts, cols);
    }
}

fn check_partials<R: Ranks>(ranks: &R, comm: &R::C, turn: usize, counts: &[usize], cols: usize) {
    let (rank, rows) = (comm.rank(), counts.iter().sum::<usize>() + 1);
    let mut parts = ranks.matrix(comm, rows, 4 * cols, &before_gather(turn, rank, counts, 4 * cols));
    let mut lse = ranks.scores(comm, rows, cols, &before_gather(turn + 1, rank, counts, cols));
    let mut sums = ranks.scores(comm, rows, 3 * cols, &before_gather(turn + 2, rank, counts, 3 * cols));
    comm.all_gather_partials(Partials::Attention(&mut parts, &mut lse), counts).expect("partial results of attention");
    let mut columns = ranks.scores(comm, rows, 5 * cols, &before_gather(turn + 3, rank, counts, 5 * cols));
    comm.all_gather_partials(Partials::Sums(&mut sums), counts).expect("partial sums");
    comm.all_gather_partials(Partials::Columns(&mut columns), counts).expect("columns of a result");
    check_gathered(rank, &ranks.matrix_values(comm, &parts), turn, counts, 4 * cols);
    check_gathered(rank, &ranks.scores_values(comm, &lse), turn + 1, counts, cols);
    check_gathered(rank, &ranks.scores_values(comm, &sums), turn + 2, counts, 3 * cols);
    check_gathered(rank, &ranks.scores_values(comm, &columns), turn + 3, counts, 5 * cols);
}

fn check_rotate<R: Ranks>(ranks: &R, comm: &R::C, turn: usize, counts: &[usize], cols: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let previous = (rank + size - 1) % size;
    let rows = counts[rank].max(counts[previous]);
    let sent: Vec<f32> = (0..rows * cols).map(|i| value(turn, rank, i)).collect();
    let [send, receive] = [&sent, &vec![7.0; rows * cols]].map(|values| ranks.matrix(comm, rows, cols, values));
    let exchange = comm.rotate([send], counts[rank], [receive], counts[previous]).expect("rotate");
    let (_, [received]) = comm.finish_all_to_all(exchange).expect("rotate");
    let values = ranks.matrix_values(comm, &received);
    let wanted: Vec<f32> = (0..counts[previous] * cols).map(|i| value(turn, previous, i)).collect();
    assert_eq!(values[..wanted.len()], wanted, "rank {rank}");
}

/// Rank `from` sends `counts[from][to]` rows to rank `to`; the value of an element tells its sender and its place among all that it sends.
fn check_all_to_all<R: Ranks>(ranks: &R, comm: &R::C, turn: usize, counts: &[Vec<usize>], cols: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let (send_counts, receive_counts) = (&counts[rank], (0..size).map(|from| counts[from][rank]).collect::<Vec<_>>());
    let (sends, receives) = (send_counts.iter().sum::<usize>(), receive_counts.iter().sum::<usize>());
    // Three matrices, of different widths; each receives to a spare row at its end that nobody may touch.
    let kinds = [(turn, cols), (turn + 1, 2 * cols), (turn + 2, cols)];
    let send = kinds.map(|(turn, cols)| {
        let values: Vec<f32> = (0..(sends + 1) * cols).map(|i| value(turn, rank, i)).collect();
        ranks.matrix(comm, sends + 1, cols, &values)
    });
    let receive = kinds.map(|(_, cols)| ranks.matrix(comm, receives + 1, cols, &vec![7.0; (receives + 1) * cols]));
    let exchange = comm.all_to_all(send, send_counts, receive, &receive_counts).expect("all-to-all");
    let (_, received) = comm.finish_all_to_all(exchange).expect("all-to-all");
    for (matrix, (turn, cols)) in received.iter().zip(kinds) {
        let wanted = (0..size).flat_map(|from| {
            let first: usize = counts[from][..rank].iter().sum();
            (first * cols..(first + counts[from][rank]) * cols).map(move |i| value(turn, from, i))
        });
        let values = ranks.matrix_values(comm, matrix);
        let (taken, spare) = values.split_at(receives * cols);
        assert_eq!(taken, wanted.collect::<Vec<_>>(), "rank {rank}");
        assert!(spare.iter().all(|&v| v == 7.0), "rows beyond the counts were written: {spare:?}");
    }
}

fn check_broadcast<C: Comm<M, S>, M, S>(comm: &C, turn: usize, root: usize) {
    let given = |rank: usize| u64::MAX - (turn * 1000 + rank) as u64;
    assert_eq!(comm.broadcast(root, given(comm.rank())).expect("broadcast"), given(root));
}

/// One collective of the given kind with sizes that agree on all ranks, waited for.
fn call<R: Ranks>(ranks: &R, comm: &R::C, op: Op) -> Result<(), CommError> {
    let counts = vec![2; comm.size()];
    let elements = vec![1.0; comm.size() * 2 * 4];
    let rows = comm.size() * 2;
    let done = match op {
        Op::AllGather => {
            comm.all_gather([ranks.matrix(comm, rows, 4, &elements)], &counts).and_then(|p| comm.finish(p)).map(drop)
        }
        Op::Partials => {
            let (mut parts, mut lse) = (ranks.matrix(comm, rows, 4, &elements), ranks.scores(comm, rows, 4, &elements));
            comm.all_gather_partials(Partials::Attention(&mut parts, &mut lse), &counts)
        }
        Op::Rotate => {
            let [send, receive] = [(); 2].map(|()| ranks.matrix(comm, rows, 4, &elements));
            comm.rotate([send], 2, [receive], 2).and_then(|x| comm.finish_all_to_all(x)).map(drop)
        }
        Op::AllToAll => {
            let [send, receive] = [(); 2].map(|()| ranks.matrix(comm, rows, 4, &elements));
            comm.all_to_all([send], &counts, [receive], &counts).and_then(|x| comm.finish_all_to_all(x)).map(drop)
        }
        Op::Broadcast => comm.broadcast(0, 1).map(drop),
        Op::Barrier => comm.barrier(),
    };
    done.and_then(|()| ranks.settle(comm))
}

fn pause(random: &mut StdRng) {
    std::thread::sleep(Duration::from_micros(random.random_range(0..500)));
}

pub fn all_gather_puts_the_rows_of_every_rank_in_order<R: Ranks>(ranks: &R) {
    for counts in [&[3][..], &[1, 2], &[0, 5], &[4, 0, 1], &[1, 1, 1, 1], &[2, 0, 0, 3, 1], &[0, 0]] {
        on_all(ranks, counts.len(), PATIENT, |_, comm| check_all_gather(ranks, &comm, 1, counts, 6));
    }
}

pub fn all_gather_of_partial_results_puts_the_rows_of_every_rank_in_order<R: Ranks>(ranks: &R) {
    for counts in [&[3][..], &[1, 2], &[0, 5], &[4, 0, 1], &[1, 1, 1, 1]] {
        on_all(ranks, counts.len(), PATIENT, |_, comm| check_partials(ranks, &comm, 1, counts, 5));
    }
}

pub fn a_full_turn_of_the_ring_brings_everything_to_everybody<R: Ranks>(ranks: &R) {
    let counts = [3, 1, 0, 2];
    let (size, cols, most) = (ranks.most().min(4), 4, 3);
    on_all(ranks, size, PATIENT, |rank, comm| {
        let own: Vec<f32> = (0..most * cols).map(|i| value(0, rank, i)).collect();
        let [mut held, mut spare] = [(); 2].map(|()| ranks.matrix(&comm, most, cols, &own));
        for step in 0..size {
            let holds = |rank: usize| (rank + size - step) % size;
            let (sent, received) = (holds(rank), holds((rank + size - 1) % size));
            let exchange = comm.rotate([held], counts[sent], [spare], counts[received]).expect("rotate");
            ([spare], [held]) = comm.finish_all_to_all(exchange).expect("rotate");
            let wanted: Vec<f32> = (0..counts[received] * cols).map(|i| value(0, received, i)).collect();
            assert_eq!(ranks.matrix_values(&comm, &held)[..wanted.len()], wanted, "rank {rank}, step {step}");
        }
    });
}

pub fn an_all_to_all_brings_every_rank_what_the_others_have_for_it<R: Ranks>(ranks: &R) {
    for size in 1..=5 {
        on_all(ranks, size, PATIENT, |_, comm| {
            // Every count differs from those of the other direction; some are 0.
            let uneven: Vec<Vec<usize>> =
                (0..size).map(|from| (0..size).map(|to| (from * 3 + to * 5) % 4).collect()).collect();
            check_all_to_all(ranks, &comm, 1, &uneven, 6);
            // A rank that takes part in nothing but the call.
            let idle: Vec<Vec<usize>> =
                (0..size).map(|from| (0..size).map(|to| usize::from(from > 0 && to > 0)).collect()).collect();
            check_all_to_all(ranks, &comm, 2, &idle, 2);
        });
    }
}

pub fn collectives_in_flight_together_keep_apart<R: Ranks>(ranks: &R) {
    let (counts, cols) = ([2, 3], 4);
    on_all(ranks, 2, PATIENT, |rank, comm| {
        let start = |turn| {
            let mut before = before_gather(turn, rank, &counts, cols);
            before.truncate(5 * cols);
            comm.all_gather([ranks.matrix(&comm, 5, cols, &before)], &counts).expect("all-gather")
        };
        let (keys, values) = (start(1), start(2));
        let [keys] = comm.finish(keys).expect("keys");
        let [values] = comm.finish(values).expect("values");
        assert_eq!(ranks.matrix_values(&comm, &keys), gathered(1, &counts, cols));
        assert_eq!(ranks.matrix_values(&comm, &values), gathered(2, &counts, cols));
    });
}

pub fn broadcast_gives_every_rank_the_value_of_the_root<R: Ranks>(ranks: &R) {
    for size in 1..=4 {
        on_all(ranks, size, PATIENT, |_, comm| (0..size).for_each(|root| check_broadcast(&comm, root, root)));
    }
}

pub fn nobody_passes_a_barrier_before_all_have_come<R: Ranks>(ranks: &R) {
    let (size, turns, come) = (ranks.most().min(4), 20, AtomicUsize::new(0));
    on_all(ranks, size, PATIENT, |rank, comm| {
        let mut random = StdRng::seed_from_u64(rank as u64);
        for turn in 1..=turns {
            pause(&mut random);
            come.fetch_add(1, Ordering::SeqCst);
            comm.barrier().expect("barrier");
            assert!(come.load(Ordering::SeqCst) >= turn * size, "rank {rank} was let through in turn {turn}");
        }
    });
}

pub fn random_collectives_with_random_delays_agree_with_their_definition<R: Ranks>(ranks: &R) {
    for seed in 0..8 {
        let size = 1 + seed as usize % 4;
        on_all(ranks, size, PATIENT, |rank, comm| {
            // The programme is the same on every rank, the delays are each rank's own.
            let mut programme = StdRng::seed_from_u64(seed);
            let mut delays = StdRng::seed_from_u64(1000 * (seed + 1) + rank as u64);
            for turn in 0..40 {
                let counts: Vec<usize> = (0..size).map(|_| programme.random_range(0..9)).collect();
                let (op, cols) = (OPS[programme.random_range(0..OPS.len())], 2 * programme.random_range(1..9));
                pause(&mut delays);
                match op {
                    Op::AllGather => check_all_gather(ranks, &comm, turn, &counts, cols),
                    Op::Partials => check_partials(ranks, &comm, turn, &counts, cols),
                    Op::Rotate => check_rotate(ranks, &comm, turn, &counts, cols),
                    Op::AllToAll => {
                        let from = |_| (0..size).map(|_| programme.random_range(0..5)).collect();
                        check_all_to_all(ranks, &comm, turn, &(0..size).map(from).collect::<Vec<_>>(), cols);
                    }
                    Op::Broadcast => check_broadcast(&comm, turn, turn % size),
                    Op::Barrier => comm.barrier().expect("barrier"),
                }
            }
        });
    }
}

pub fn an_abort_ends_every_collective_on_every_rank<R: Ranks>(ranks: &R) {
    let size = ranks.most().min(3);
    for op in OPS {
        for culprit in 0..size {
            let others_work = std::sync::Barrier::new(size);
            on_all(ranks, size, PATIENT, |rank, comm| {
                call(ranks, &comm, op).expect("before the abort");
                others_work.wait();
                pause(&mut StdRng::seed_from_u64(rank as u64));
                if rank == culprit {
                    comm.abort("the device caught fire");
                }
                for again in 0..2 {
                    match call(ranks, &comm, op) {
                        Err(CommError::Aborted { rank: named, reason }) => {
                            assert_eq!((named, reason.as_str()), (culprit, "the device caught fire"));
                        }
                        other => panic!("{op:?}, call {again} on rank {rank} after rank {culprit}'s abort: {other:?}"),
                    }
                }
            });
        }
    }
}

pub fn the_first_reason_of_an_abort_is_kept<R: Ranks>(ranks: &R) {
    on_all(ranks, 1, PATIENT, |_, comm| {
        comm.abort("first");
        comm.abort("second");
        assert!(matches!(comm.barrier(), Err(CommError::Aborted { rank: 0, reason }) if reason == "first"));
    });
}

pub fn a_rank_that_dies_ends_every_collective_of_the_others<R: Ranks>(ranks: &R) {
    let size = ranks.most().min(3);
    for op in OPS {
        let all_alive = std::sync::Barrier::new(size);
        on_all(ranks, size, PATIENT, |rank, comm| {
            call(ranks, &comm, op).expect("before the death");
            all_alive.wait();
            if rank == 1 {
                return;
            }
            match call(ranks, &comm, op) {
                Err(CommError::Aborted { rank: named, .. }) => assert_eq!(named, 1),
                other => panic!("{op:?} on rank {rank} after rank 1 died: {other:?}"),
            }
        });
    }
}

pub fn a_rank_that_never_comes_ends_the_wait_of_the_others<R: Ranks>(ranks: &R) {
    let size = ranks.most().min(3);
    for op in OPS {
        let others_done = std::sync::Barrier::new(size);
        let results = on_all(ranks, size, HASTY, |rank, comm| {
            let result = if rank + 1 == size { Ok(()) } else { call(ranks, &comm, op) };
            others_done.wait();
            (result, call(ranks, &comm, op))
        });
        let timed_out = |result: &Result<(), CommError>| matches!(result, Err(CommError::TimedOut { .. }));
        assert!(results.iter().any(|(first, _)| timed_out(first)), "{op:?}: {results:?}");
        assert!(results[..size - 1].iter().all(|(first, _)| first.is_err()), "{op:?}: {results:?}");
        let ended = |result: &Result<(), CommError>| matches!(result, Err(CommError::Aborted { .. }));
        assert!(results.iter().all(|(_, later)| ended(later)), "{op:?}: {results:?}");
    }
}

pub fn a_rank_that_comes_further_is_waited_for_beyond_the_deadline<R: Ranks>(ranks: &R) {
    let (size, deadline) = (ranks.most().min(3), Duration::from_millis(600));
    for op in [Op::AllGather, Op::Partials, Op::Broadcast] {
        on_all(ranks, size, deadline, |rank, comm| {
            for _ in (0..6).filter(|_| rank + 1 == size) {
                std::thread::sleep(deadline / 3);
                comm.come_further();
            }
            call(ranks, &comm, op).expect("twice as late as the deadline, but never silent for so long");
        });
    }
}

pub fn ranks_that_disagree_are_told_so<R: Ranks>(ranks: &R) {
    let wrong: [(&str, Body<R>); 8] = [
        ("counts", |ranks, comm, rank| {
            let counts = if rank == 1 { [1, 2, 1] } else { [1, 1, 1] };
            let matrix = ranks.matrix(comm, 4, 2, &[0.0; 8]);
            comm.all_gather([matrix], &counts).and_then(|pending| comm.finish(pending)).map(drop)
        }),
        ("widths", |ranks, comm, rank| {
            let (cols, mut parts) = (if rank == 2 { 4 } else { 2 }, ranks.matrix(comm, 3, 2, &[0.0; 6]));
            let mut lse = ranks.scores(comm, 3, cols, &vec![0.0; 3 * cols]);
            comm.all_gather_partials(Partials::Attention(&mut parts, &mut lse), &[1, 1, 1])
        }),
        ("which partial results", |ranks, comm, rank| {
            let (mut parts, mut sums) = (ranks.matrix(comm, 3, 2, &[0.0; 6]), ranks.scores(comm, 3, 2, &[0.0; 6]));
            let partials = match rank {
                2 => Partials::Sums(&mut sums),
                _ => Partials::Attention(&mut parts, &mut sums),
            };
            comm.all_gather_partials(partials, &[1, 1, 1])
        }),
        ("how many matrices", |ranks, comm, rank| {
            let matrix = || ranks.matrix(comm, 3, 2, &[0.0; 6]);
            match rank {
                1 => comm.all_gather([matrix()], &[1, 1, 1]).and_then(|pending| comm.finish(pending)).map(drop),
                _ => comm.all_gather([matrix(), matrix()], &[1, 1, 1]).and_then(|both| comm.finish(both)).map(drop),
            }
        }),
        ("what is sent and what is awaited", |ranks, comm, rank| {
            let receive = if rank == 0 { 2 } else { 1 };
            let [sent, received] = [(); 2].map(|()| ranks.matrix(comm, 2, 2, &[0.0; 4]));
            let exchange = comm.rotate([sent], 1, [received], receive);
            exchange.and_then(|exchange| comm.finish_all_to_all(exchange)).map(drop)
        }),
        ("what is sent to one of several and what it awaits", |ranks, comm, rank| {
            let receive_counts = if rank == 2 { [1, 0, 1] } else { [1, 1, 1] };
            let [send, receive] = [(); 2].map(|()| ranks.matrix(comm, 3, 2, &[0.0; 6]));
            let exchange = comm.all_to_all([send], &[1, 1, 1], [receive], &receive_counts);
            exchange.and_then(|exchange| comm.finish_all_to_all(exchange)).map(drop)
        }),
        ("roots", |_, comm, rank| comm.broadcast(usize::from(rank == 0), 5).map(drop)),
        ("the operation", |_, comm, rank| if rank == 1 { comm.barrier() } else { comm.broadcast(0, 5).map(drop) }),
    ];
    for (what, body) in wrong {
        for seed in 0..4 {
            let results = on_all(ranks, 3, PATIENT, |rank, comm| {
                pause(&mut StdRng::seed_from_u64(seed * 3 + rank as u64));
                body(ranks, &comm, rank).and_then(|()| ranks.settle(&comm))
            });
            let told = |result: &Result<(), CommError>| {
                matches!(result, Err(CommError::Mismatch { .. } | CommError::Aborted { .. }))
            };
            assert!(results.iter().all(told), "{what}: {results:?}");
            let saw = |result: &Result<(), CommError>| matches!(result, Err(CommError::Mismatch { .. }));
            assert!(results.iter().any(saw), "{what}: {results:?}");
        }
    }
}

pub fn sizes_wrong_by_themselves_are_refused<R: Ranks>(ranks: &R) {
    let all_to_all = |ranks: &R, comm: &R::C, cols: usize, send: &[usize], receive: &[usize]| {
        let sent = ranks.matrix(comm, 2, cols, &vec![0.0; 2 * cols]);
        comm.all_to_all([sent], send, [ranks.matrix(comm, 2, 2, &[0.0; 4])], receive).map(drop)
    };
    for (cols, send, receive) in
        [(2, &[1, 2][..], &[1, 1][..]), (2, &[1, 1], &[2, 1]), (2, &[1, 1], &[1]), (4, &[1, 1], &[1, 1])]
    {
        for result in on_all(ranks, 2, PATIENT, |_, comm| all_to_all(ranks, &comm, cols, send, receive)) {
            assert!(matches!(result, Err(CommError::Mismatch { .. } | CommError::Aborted { .. })), "{result:?}");
        }
    }
    let bodies: [Body<R>; 5] = [
        |ranks, comm, _| comm.all_gather([ranks.matrix(comm, 2, 2, &[0.0; 4])], &[1, 2]).map(drop),
        |ranks, comm, _| comm.all_gather([ranks.matrix(comm, 2, 2, &[0.0; 4])], &[1]).map(drop),
        // One of the two has too few rows.
        |ranks, comm, _| {
            let [tall, short] = [2, 1].map(|rows| ranks.matrix(comm, rows, 2, &vec![0.0; 2 * rows]));
            comm.all_gather([tall, short], &[1, 1]).map(drop)
        },
        |ranks, comm, _| {
            let [send, receive] = [(); 2].map(|()| ranks.matrix(comm, 2, 2, &[0.0; 4]));
            comm.rotate([send], 3, [receive], 3).map(drop)
        },
        |_, comm, _| comm.broadcast(2, 0).map(drop),
    ];
    for body in bodies {
        for result in on_all(ranks, 2, PATIENT, |rank, comm| body(ranks, &comm, rank)) {
            assert!(matches!(result, Err(CommError::Mismatch { .. } | CommError::Aborted { .. })), "{result:?}");
        }
    }
}
