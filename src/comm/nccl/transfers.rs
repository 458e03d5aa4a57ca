//! Collectives as what one rank sends and receives. Where a matrix lies is told by its first row.
//!
//! Invariant: what rank `a` sends to rank `b` is what rank `b` receives of rank `a`, in the same order; nothing of no bytes is among it.

use super::library::Transfer;
use crate::backend::cuda::Extent;

/// An in-place all-gather: `counts[r]` rows of rank `r`, one after the other from the first row of each matrix on.
pub(super) fn all_gather(rank: usize, counts: &[usize], matrices: &[Extent]) -> Vec<Transfer> {
    let is_even = counts.iter().all(|count| *count == counts[0]);
    let mut transfers = Vec::new();
    for first_row in matrices {
        if is_even {
            let (at, bytes) = (first_row.address, counts[0] * first_row.bytes);
            transfers.extend((bytes > 0).then_some(Transfer::Gather { at, bytes, rank }));
            continue;
        }
        let places = places(counts, *first_row);
        for (to, from) in turns(rank, counts.len()).skip(1) {
            push_send(&mut transfers, places[rank], to);
            push_receive(&mut transfers, places[from], from);
        }
    }
    transfers
}

/// An all-to-all: to rank `p` go `send_counts[p]` rows, from it come `receive_counts[p]`, in the order of the ranks from the first rows on; of as many
/// matrices as they are received in.
pub(super) fn all_to_all(
    rank: usize,
    (send, send_counts): (&[Extent], &[usize]),
    (receive, receive_counts): (&[Extent], &[usize]),
) -> Vec<Transfer> {
    let mut transfers = Vec::new();
    for (from_row, to_row) in send.iter().zip(receive) {
        let (sent, received) = (places(send_counts, *from_row), places(receive_counts, *to_row));
        for (to, from) in turns(rank, send_counts.len()) {
            push_send(&mut transfers, sent[to], to);
            push_receive(&mut transfers, received[from], from);
        }
    }
    transfers
}

/// Whom a rank sends to and receives from, itself first, so that in each turn every rank is sent to by one.
fn turns(rank: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).map(move |turn| ((rank + turn) % size, (rank + size - turn) % size))
}

fn places(counts: &[usize], first_row: Extent) -> Vec<Extent> {
    let mut next = first_row.address;
    let place = |count: &usize| {
        let extent = Extent { address: next, bytes: count * first_row.bytes };
        next += extent.bytes as u64;
        extent
    };
    counts.iter().map(place).collect()
}

fn push_send(transfers: &mut Vec<Transfer>, Extent { address, bytes }: Extent, to: usize) {
    if bytes > 0 {
        transfers.push(Transfer::Send { from: address, bytes, to });
    }
}

fn push_receive(transfers: &mut Vec<Transfer>, Extent { address, bytes }: Extent, from: usize) {
    if bytes > 0 {
        transfers.push(Transfer::Receive { to: address, bytes, from });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(transfers: &[Transfer], peer: usize) -> Vec<(u64, usize)> {
        let of = |transfer: &Transfer| match *transfer {
            Transfer::Send { from, bytes, to } if to == peer => Some((from, bytes)),
            _ => None,
        };
        transfers.iter().filter_map(of).collect()
    }

    fn received(transfers: &[Transfer], peer: usize) -> Vec<(u64, usize)> {
        let of = |transfer: &Transfer| match *transfer {
            Transfer::Receive { to, bytes, from } if from == peer => Some((to, bytes)),
            _ => None,
        };
        transfers.iter().filter_map(of).collect()
    }

    fn row(address: u64, bytes: usize) -> Extent {
        Extent { address, bytes }
    }

    #[test]
    fn an_uneven_gather_puts_every_rank_in_its_place() {
        let counts = [2, 0, 3];
        for rank in 0..3 {
            let transfers = all_gather(rank, &counts, &[row(1000, 10), row(5000, 4)]);
            let places = [[(1000, 20), (5000, 8)], [(1020, 0), (5008, 0)], [(1020, 30), (5008, 12)]];
            for peer in (0..3).filter(|&peer| peer != rank) {
                let of = |r: usize| if counts[r] > 0 { places[r].to_vec() } else { Vec::new() };
                assert_eq!(sent(&transfers, peer), of(rank), "{rank} to {peer}");
                assert_eq!(received(&transfers, peer), of(peer), "{rank} from {peer}");
            }
            assert!(sent(&transfers, rank).is_empty());
        }
    }

    #[test]
    fn an_even_gather_is_the_librarys_own_and_an_empty_one_is_none() {
        let [first, second] = [(64, 32), (512, 8)].map(|(at, bytes)| Transfer::Gather { at, bytes, rank: 1 });
        assert_eq!(all_gather(1, &[4, 4], &[row(64, 8), row(512, 2)]), [first, second]);
        assert_eq!(all_gather(1, &[0, 0], &[row(64, 8)]), []);
    }

    #[test]
    fn what_one_rank_sends_another_receives() {
        let counts = |from: usize, to: usize| (from * 3 + to * 5) % 4;
        let of = |rank: usize| {
            let sends: Vec<usize> = (0..4).map(|to| counts(rank, to)).collect();
            let receives: Vec<usize> = (0..4).map(|from| counts(from, rank)).collect();
            all_to_all(rank, (&[row(0, 2), row(2000, 6)], &sends), (&[row(5000, 2), row(7000, 6)], &receives))
        };
        for from in 0..4 {
            for to in 0..4 {
                let bytes = |places: Vec<(u64, usize)>| places.into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>();
                let rows = counts(from, to);
                let expected = if rows > 0 { vec![2 * rows, 6 * rows] } else { Vec::new() };
                assert_eq!(bytes(sent(&of(from), to)), expected);
                assert_eq!(bytes(received(&of(to), from)), expected);
            }
        }
    }

    #[test]
    fn a_rank_alone_sends_to_itself() {
        let transfers = all_to_all(0, (&[row(10, 3)], &[2]), (&[row(20, 3)], &[2]));
        assert_eq!((sent(&transfers, 0), received(&transfers, 0)), (vec![(10, 6)], vec![(20, 6)]));
    }
}
