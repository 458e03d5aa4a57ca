//! Which group of a pool a document goes to.
//!
//! Whoever waits is asked for in the order of coming, and goes where it can now; who can not go anywhere holds up nobody. An idle group takes what
//! fits into it, the smallest such group first; if none is idle, the document goes where it is predicted to be done first, of the groups that take it.
//! A group takes one document ahead of its work, so that it never pauses, and beside that one that is short enough to overtake; the others wait for
//! whatever group is free first.
//!
//! Invariant: pure. A document that could go to a group that takes it goes; it never goes where it does not fit.

/// A document is short beside a prefill if it takes at most this part of what that one has left: the engine lets such a one overtake.
const SHORT_PART: f64 = 0.25;

/// A group as it is now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupLoad {
    /// Devices of the group.
    pub ranks: usize,
    /// Predicted seconds of the longest document that it takes now; 0: it takes none.
    pub takes_up_to_s: f64,
    /// Documents that it works on.
    pub documents: usize,
    /// Predicted seconds until what it has is prefilled.
    pub backlog_s: f64,
}

/// What a group takes that has so many seconds left of its running prefill, and where documents of so many seconds wait for their prefill.
pub fn takes_up_to_s(running_s: f64, waiting_s: impl IntoIterator<Item = f64>) -> f64 {
    let short_s = SHORT_PART * running_s;
    waiting_s
        .into_iter()
        .fold(f64::INFINITY, |takes_s, waits_s| if waits_s <= short_s { 0.0 } else { takes_s.min(short_s) })
}

/// Where a document goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// To the group with this index.
    Group(usize),
    /// It waits: groups that it fits into are full.
    Later,
    /// It fits into no group.
    Nowhere,
}

/// Where a document goes that would take `seconds[group]` in each group; `None` where it does not fit, even alone.
pub fn place(seconds: &[Option<f64>], groups: &[GroupLoad]) -> Destination {
    let fitting = || {
        seconds.iter().zip(groups).enumerate().filter_map(|(index, (seconds, group))| Some((index, (*seconds)?, group)))
    };
    let taking = || fitting().filter(|(_, seconds, group)| *seconds <= group.takes_up_to_s);
    let idle = taking().filter(|(_, _, group)| group.documents == 0);
    if let Some((index, _, _)) = idle.min_by_key(|(_, _, group)| group.ranks) {
        return Destination::Group(index);
    }
    let end = |seconds: f64, group: &GroupLoad| group.backlog_s + seconds;
    let first = taking().min_by(|one, other| end(one.1, one.2).total_cmp(&end(other.1, other.2)));
    match first {
        Some((index, _, _)) => Destination::Group(index),
        None if fitting().next().is_some() => Destination::Later,
        None => Destination::Nowhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(ranks: usize, documents: usize, backlog_s: f64) -> GroupLoad {
        GroupLoad { ranks, takes_up_to_s: f64::INFINITY, documents, backlog_s }
    }

    #[test]
    fn an_idle_group_comes_first_and_of_those_the_smallest() {
        let groups = [group(8, 0, 0.0), group(1, 0, 0.0), group(1, 1, 0.5)];
        assert_eq!(place(&[Some(1.0), Some(6.0), Some(6.0)], &groups), Destination::Group(1));
        let groups = [group(8, 0, 0.0), group(1, 1, 0.1), group(1, 1, 0.5)];
        assert_eq!(place(&[Some(1.0), Some(0.2), Some(0.2)], &groups), Destination::Group(0));
    }

    #[test]
    fn of_busy_groups_the_one_that_is_done_first_takes_it() {
        let groups = [group(4, 1, 3.0), group(1, 2, 1.0)];
        assert_eq!(place(&[Some(1.0), Some(2.5)], &groups), Destination::Group(1));
        assert_eq!(place(&[Some(1.0), Some(4.0)], &groups), Destination::Group(0));
    }

    #[test]
    fn what_fits_nowhere_is_told_from_what_has_to_wait() {
        let full = GroupLoad { takes_up_to_s: 0.5, ..group(4, 2, 9.0) };
        let groups = [full, group(1, 0, 0.0)];
        assert_eq!(place(&[Some(1.0), None], &groups), Destination::Later);
        assert_eq!(place(&[Some(0.5), None], &groups), Destination::Group(0));
        assert_eq!(place(&[None, None], &groups), Destination::Nowhere);
    }

    #[test]
    fn one_document_waits_and_a_short_one_beside_it() {
        assert_eq!(takes_up_to_s(8.0, []), f64::INFINITY);
        assert_eq!(takes_up_to_s(8.0, [6.0]), 2.0);
        assert_eq!(takes_up_to_s(8.0, [6.0, 1.0]), 0.0);
        assert_eq!(takes_up_to_s(8.0, [1.0]), 0.0);
        assert_eq!(takes_up_to_s(0.0, [1.0]), 0.0);
    }
}
