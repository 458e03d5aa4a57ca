//! What every communicator has to do, as functions that run on any of them.
//!
//! Each takes a `group`: the ends of a fresh communicator of so many ranks, with a deadline.

use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::{Comm, CommError};
use crate::backend::cpu::{Matrix, Scores};

const LONG: Duration = Duration::from_secs(60);

/// Runs every rank in a thread and gives their results in order.
fn run<C, T>(group: Vec<C>, each: impl Fn(C) -> T + Sync) -> Vec<T>
where
    C: Comm<Matrix, Scores>,
    T: Send,
{
    scope(|scope| {
        let each = &each;
        let threads: Vec<_> = group.into_iter().map(|comm| scope.spawn(move || each(comm))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// Sleeps for a while that depends on rank and step, so that ranks overtake each other.
fn dawdle(rank: usize, step: usize) {
    let mut rng = StdRng::seed_from_u64((rank * 1000 + step) as u64);
    sleep(Duration::from_micros(rng.random_range(0..800)));
}

/// Rows of `cols` columns that tell where they come from.
fn row(rank: usize, index: usize, step: usize, cols: usize) -> Vec<f32> {
    (0..cols).map(|col| (rank * 1_000_000 + step * 10_000 + index * 100 + col) as f32).collect()
}

/// Many rounds of everything, with uneven and empty parts, ranks arriving in any order.
pub(crate) fn collectives_move_the_right_rows<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    for size in [1, 2, 3, 5, 8] {
        run(group(size, LONG), |comm| {
            for step in 0..20 {
                dawdle(comm.rank(), step);
                round_of_everything(&comm, step).expect("no rank fails");
            }
        });
    }
}

fn round_of_everything<C: Comm<Matrix, Scores>>(comm: &C, step: usize) -> Result<(), CommError> {
    let (me, size, cols) = (comm.rank(), comm.size(), 3);
    let counts: Vec<usize> = (0..size).map(|rank| (rank + step) % 4).collect();
    let first = |rank: usize| counts[..rank].iter().sum::<usize>();
    let mut rows = Matrix::new(first(size) + 1, cols);
    for i in 0..counts[me] {
        rows.rows_in_mut(first(me) + i..first(me) + i + 1).copy_from_slice(&row(me, i, step, cols));
    }
    let mut scores = rows.clone();
    let gathering = comm.all_gather(rows, &counts)?;
    dawdle(me, step + 100);
    // Another collective may be started before the first one is awaited.
    let mut block = Matrix::new(4, cols);
    for i in 0..counts[me] {
        block.rows_in_mut(i..i + 1).copy_from_slice(&row(me, i, step, cols));
    }
    let previous = (me + size - 1) % size;
    let rotating = comm.rotate(block, counts[me], counts[previous])?;
    let gathered = comm.finish(gathering)?;
    comm.all_gather_scores(&mut scores, &counts)?;
    for (rank, &count) in counts.iter().enumerate() {
        for i in 0..count {
            assert_eq!(gathered.row(first(rank) + i), row(rank, i, step, cols));
            assert_eq!(scores.row(first(rank) + i), row(rank, i, step, cols));
        }
    }
    let rotated = comm.finish(rotating)?;
    for i in 0..counts[previous] {
        assert_eq!(rotated.row(i), row(previous, i, step, cols));
    }
    let root = step % size;
    let value = comm.broadcast(root, (me * 100 + step) as u64)?;
    assert_eq!(value, (root * 100 + step) as u64);
    comm.barrier()
}

/// One rank aborts before each of the collectives in turn; every other rank gets the reason and none hangs.
pub(crate) fn an_abort_reaches_everybody<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    for collective in 0..5 {
        let outcomes = run(group(3, LONG), |comm| {
            comm.barrier()?;
            if comm.rank() == 1 {
                dawdle(1, collective);
                comm.abort("the test says so");
            }
            one_of(&comm, collective)
        });
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                // Of a rotation, rank 0 needs rank 2 alone.
                Ok(()) => assert_eq!((rank, collective), (0, 1), "completed without rank 1"),
                Err(error) => assert_eq!(error.to_string(), "rank 1 aborted: the test says so"),
            }
        }
    }
}

fn one_of<C: Comm<Matrix, Scores>>(comm: &C, collective: usize) -> Result<(), CommError> {
    let counts = vec![1; comm.size()];
    let rows = || Matrix::new(comm.size(), 2);
    match collective {
        0 => comm.all_gather(rows(), &counts).and_then(|pending| comm.finish(pending)).map(drop),
        1 => comm.rotate(rows(), 1, 1).and_then(|pending| comm.finish(pending)).map(drop),
        2 => comm.all_gather_scores(&mut rows(), &counts),
        3 => comm.broadcast(1, 7).map(drop),
        _ => comm.barrier(),
    }
}

/// A rank that ends without a word ends the others.
pub(crate) fn a_rank_that_is_gone_ends_the_others<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    for collective in 0..5 {
        let began = Instant::now();
        let outcomes = run(group(3, LONG), |comm| if comm.rank() == 1 { Ok(()) } else { one_of(&comm, collective) });
        // Of a rotation, rank 0 waits for rank 2 alone.
        assert!(outcomes[2].is_err(), "collective {collective}: {outcomes:?}");
        assert!(began.elapsed() < LONG / 2, "collective {collective} waited for its deadline");
    }
}

/// A rank that leaves after its last collective takes nothing from those that still have to finish it.
pub(crate) fn the_first_to_finish_may_leave<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    let outcomes = run(group(4, LONG), |comm| {
        let pending = comm.all_gather(Matrix::new(4, 2), &[1; 4])?;
        sleep(Duration::from_millis(5 * comm.rank() as u64));
        comm.finish(pending).map(drop)
    });
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
}

/// Nobody waits longer than the deadline.
pub(crate) fn a_wait_ends_at_the_deadline<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    let deadline = Duration::from_millis(50);
    let outcomes = run(group(2, deadline), |comm| {
        if comm.rank() == 1 {
            sleep(deadline * 20);
        }
        comm.barrier()
    });
    assert!(matches!(outcomes[0], Err(CommError::TimedOut { op: "barrier", rank: 0, .. })), "{outcomes:?}");
    assert!(matches!(outcomes[1], Err(CommError::Aborted { rank: 0, .. })), "{outcomes:?}");
}

/// Ranks that disagree are told so, all of them.
pub(crate) fn disagreement_is_an_error_everywhere<C: Comm<Matrix, Scores>>(group: impl Fn(usize, Duration) -> Vec<C>) {
    let different_counts = run(group(2, LONG), |comm| {
        let counts = [1, 1 + comm.rank()];
        comm.all_gather(Matrix::new(4, 2), &counts).and_then(|pending| comm.finish(pending)).map(drop)
    });
    let different_calls = run(group(2, LONG), |comm| one_of(&comm, 3 + comm.rank()));
    let too_many_rows = run(group(2, LONG), |comm| {
        comm.all_gather(Matrix::new(1, 2), &[1, 1]).and_then(|pending| comm.finish(pending)).map(drop)
    });
    let other_sizes_of_a_ring = run(group(2, LONG), |comm| {
        comm.rotate(Matrix::new(4, 2), 1, 2).and_then(|pending| comm.finish(pending)).map(drop)
    });
    for outcomes in [different_counts, different_calls, too_many_rows, other_sizes_of_a_ring] {
        assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
        assert!(outcomes.iter().any(|outcome| matches!(outcome, Err(CommError::Mismatch { .. }))), "{outcomes:?}");
    }
}
