//! Collectives as what one rank sends and receives.
//!
//! Invariant: what rank `a` sends to rank `b` is what rank `b` receives of rank `a`, in the same order; nothing of no bytes is among it.

use super::library::Transfer;
use crate::backend::cuda::Extent;

/// An in-place all-gather: `counts[r]` rows of `row_bytes` of rank `r`, one after the other from `at` on.
pub(super) fn all_gather(rank: usize, counts: &[usize], row_bytes: usize, at: u64) -> Vec<Transfer> {
    if counts.iter().all(|count| *count == counts[0]) {
        let bytes = counts[0] * row_bytes;
        return if bytes > 0 { vec![Transfer::Gather { at, bytes, rank }] } else { Vec::new() };
    }
    let places = places(counts, row_bytes, at);
    let mut transfers = Vec::new();
    for (to, from) in turns(rank, counts.len()).skip(1) {
        push_send(&mut transfers, places[rank], to);
        push_receive(&mut transfers, places[from], from);
    }
    transfers
}

/// An all-to-all: to rank `p` go `send_counts[p]` rows, from it come `receive_counts[p]`, in the order of the ranks from `send` and `receive` on.
pub(super) fn all_to_all(
    rank: usize,
    (send, send_counts): (u64, &[usize]),
    (receive, receive_counts): (u64, &[usize]),
    row_bytes: usize,
) -> Vec<Transfer> {
    let (sent, received) = (places(send_counts, row_bytes, send), places(receive_counts, row_bytes, receive));
    let mut transfers = Vec::new();
    for (to, from) in turns(rank, send_counts.len()) {
        push_send(&mut transfers, sent[to], to);
        push_receive(&mut transfers, received[from], from);
    }
    transfers
}

/// Whom a rank sends to and receives from, itself first, so that in each turn every rank is sent to by one.
fn turns(rank: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..size).map(move |turn| ((rank + turn) % size, (rank + size - turn) % size))
}

fn places(counts: &[usize], row_bytes: usize, at: u64) -> Vec<Extent> {
    let mut next = at;
    let place = |count: &usize| {
        let extent = Extent { address: next, bytes: count * row_bytes };
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

    #[test]
    fn an_uneven_gather_puts_every_rank_in_its_place() {
        let counts = [2, 0, 3];
        for rank in 0..3 {
            let transfers = all_gather(rank, &counts, 10, 1000);
            let places = [(1000, 20), (1020, 0), (1020, 30)];
            for peer in (0..3).filter(|&peer| peer != rank) {
                let of = |r: usize| if counts[r] > 0 { vec![places[r]] } else { Vec::new() };
                assert_eq!(sent(&transfers, peer), of(rank), "{rank} to {peer}");
                assert_eq!(received(&transfers, peer), of(peer), "{rank} from {peer}");
            }
            assert!(sent(&transfers, rank).is_empty());
        }
    }

    #[test]
    fn an_even_gather_is_the_librarys_own_and_an_empty_one_is_none() {
        assert_eq!(all_gather(1, &[4, 4], 8, 64), [Transfer::Gather { at: 64, bytes: 32, rank: 1 }]);
        assert_eq!(all_gather(1, &[0, 0], 8, 64), []);
    }

    #[test]
    fn what_one_rank_sends_another_receives() {
        let counts = |from: usize, to: usize| (from * 3 + to * 5) % 4;
        let of = |rank: usize| {
            let sends: Vec<usize> = (0..4).map(|to| counts(rank, to)).collect();
            let receives: Vec<usize> = (0..4).map(|from| counts(from, rank)).collect();
            all_to_all(rank, (0, &sends), (5000, &receives), 2)
        };
        for from in 0..4 {
            for to in 0..4 {
                let bytes = |places: Vec<(u64, usize)>| places.into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>();
                let expected = if counts(from, to) > 0 { vec![2 * counts(from, to)] } else { Vec::new() };
                assert_eq!(bytes(sent(&of(from), to)), expected);
                assert_eq!(bytes(received(&of(to), from)), expected);
            }
        }
    }

    #[test]
    fn a_rank_alone_sends_to_itself() {
        let transfers = all_to_all(0, (10, &[2]), (20, &[2]), 3);
        assert_eq!((sent(&transfers, 0), received(&transfers, 0)), (vec![(10, 6)], vec![(20, 6)]));
    }
}
