//! How the devices of a machine are joined, and the order in which ranks go round them.
//!
//! Invariant: the order depends on the links alone; of equals it is the one that is nearest to what was given.

use super::driver::{link, start_driver};
use crate::BackendError;

/// Devices up to which every order is tried; more are put in order one by one.
const TRY_ALL_UP_TO: usize = 8;

/// What no link costs: more than any that is there.
const NO_LINK: u64 = 1 << 20;

/// `devices` so that neighbours, the last and the first among them, have the fastest links there are. The first stays the first.
pub fn in_ring_order(devices: &[usize]) -> Result<Vec<usize>, BackendError> {
    if devices.len() < 4 {
        // A ring of three or fewer is the same in every order.
        return Ok(devices.to_vec());
    }
    start_driver().map_err(BackendError::Unavailable)?;
    let mut costs = Vec::with_capacity(devices.len());
    for &from in devices {
        let to = |&to: &usize| if to == from { Ok(Some(0)) } else { link(from, to) };
        costs.push(devices.iter().map(to).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(ring_order(&costs).into_iter().map(|index| devices[index]).collect())
}

/// Indices in the order of a ring whose links, `[from][to]`, cost least; the costliest link counts before the sum.
fn ring_order(links: &[Vec<Option<u32>>]) -> Vec<usize> {
    let cost = |from: usize, to: usize| links[from][to].map_or(NO_LINK, u64::from);
    if links.len() > TRY_ALL_UP_TO {
        return nearest_next(links.len(), cost);
    }
    let mut best: Option<((u64, u64), Vec<usize>)> = None;
    let mut order: Vec<usize> = (0..links.len()).collect();
    loop {
        let steps = (0..order.len()).map(|i| cost(order[i], order[(i + 1) % order.len()]));
        let costs = steps.fold((0, 0), |(most, sum): (u64, u64), step| (most.max(step), sum + step));
        if best.as_ref().is_none_or(|(least, _)| costs < *least) {
            best = Some((costs, order.clone()));
        }
        if order.len() < 2 || !next_permutation(&mut order[1..]) {
            return best.map(|(_, order)| order).unwrap_or_default();
        }
    }
}

/// From the first on, always to the nearest that is left.
fn nearest_next(count: usize, cost: impl Fn(usize, usize) -> u64) -> Vec<usize> {
    let (mut order, mut left) = (vec![0], (1..count).collect::<Vec<_>>());
    while let Some(next) = left.iter().copied().min_by_key(|&next| cost(order[order.len() - 1], next)) {
        left.retain(|&index| index != next);
        order.push(next);
    }
    order
}

/// The next one in lexicographic order; `false` after the last.
fn next_permutation(order: &mut [usize]) -> bool {
    let Some(at) = order.windows(2).rposition(|pair| pair[0] < pair[1]) else { return false };
    let with = order.iter().rposition(|index| *index > order[at]).unwrap_or(at);
    order.swap(at, with);
    order[at + 1..].reverse();
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Links of cost 0 within a pair, and `far` between others.
    fn pairs(pairs: &[(usize, usize)], count: usize, far: Option<u32>) -> Vec<Vec<Option<u32>>> {
        let near = |a: usize, b: usize| a == b || pairs.contains(&(a, b)) || pairs.contains(&(b, a));
        (0..count).map(|from| (0..count).map(|to| if near(from, to) { Some(0) } else { far }).collect()).collect()
    }

    #[test]
    fn devices_that_are_all_alike_stay_as_they_are() {
        for count in [0, 1, 2, 5, 8, 12] {
            assert_eq!(ring_order(&pairs(&[], count, Some(0))), (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn pairs_joined_by_a_bridge_become_neighbours() {
        assert_eq!(ring_order(&pairs(&[(0, 2), (1, 3)], 4, Some(1))), [0, 1, 3, 2]);
        assert_eq!(ring_order(&pairs(&[(0, 3), (1, 4), (2, 5)], 6, Some(1))), [0, 1, 4, 2, 5, 3]);
    }

    #[test]
    fn a_ring_of_links_is_found_and_what_is_not_linked_is_avoided() {
        let chain = [(0, 4), (4, 1), (1, 3), (3, 2), (2, 0)];
        assert_eq!(ring_order(&pairs(&chain, 5, None)), [0, 2, 3, 1, 4]);
        let halves: Vec<(usize, usize)> =
            (0..12).flat_map(|a| (0..12).filter(move |b| a % 2 == b % 2).map(move |b| (a, b))).collect();
        assert_eq!(ring_order(&pairs(&halves, 12, Some(3))), [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]);
    }
}
