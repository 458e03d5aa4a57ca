//! Which group of a pool a document goes to, and when.
//!
//! Who waits is asked for in the order of coming, and goes where it can now; who can not go anywhere holds up nobody. An idle group takes what fits
//! into it, the smallest such group first. If none is idle, the document goes where it is predicted to be done first, of the groups that take one:
//! a group takes one document ahead of its work, so that it never pauses, and beside that one that is short enough to overtake. The others wait
//! for whatever group is free first. One that was overtaken too often, because there is never enough memory for it at once, has its group kept
//! free for it.
//!
//! Invariant: pure. The documents in a group never need more memory than it has; a group without work takes the first document that fits.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

/// A document is short beside a prefill if it takes at most this part of what that one has left: an engine lets such a one overtake.
const SHORT_PART: f64 = 0.25;
/// So often a document is overtaken in a group that it fits into before that group waits for it.
const OVERTAKEN_AT_MOST: u32 = 16;

/// A document's name here: later ones are greater.
pub type Ticket = u64;

/// What a group is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupShape {
    /// Devices: what makes one group smaller than another.
    pub ranks: usize,
    /// Documents at a time.
    pub slots: usize,
    /// Memory for documents, in bytes.
    pub memory_bytes: u64,
}

/// What a document takes of a group that it fits into.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// Predicted seconds of its prefill, alone.
    pub seconds: f64,
    /// Memory that it keeps until its end, in bytes.
    pub kept_bytes: u64,
    /// Memory of its prefill besides, in bytes: one prefill at a time has it.
    pub transient_bytes: u64,
}

/// What a group has in hand.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Documents.
    pub documents: usize,
    /// Memory that they keep, in bytes.
    pub kept_bytes: u64,
    /// Memory of the prefill among them that needs most, in bytes.
    pub transient_bytes: u64,
    /// Predicted seconds until all of them are prefilled.
    pub backlog_s: f64,
    /// Predicted seconds of the longest document that it takes now; less than 0: it takes none.
    pub takes_up_to_s: f64,
}

#[derive(Debug)]
struct Group {
    shape: GroupShape,
    /// It has an engine that can be asked.
    is_open: bool,
}

#[derive(Debug)]
struct Waiting {
    offers: Vec<Option<Offer>>,
    overtaken: u32,
}

#[derive(Debug)]
struct Placed {
    group: usize,
    waiting: Waiting,
    offer: Offer,
    /// The part of the prefill that is left; `None` before it begins.
    left: Option<f64>,
}

/// All documents of a pool, and where they are.
#[derive(Debug)]
pub struct Router {
    groups: Vec<Group>,
    waiting: BTreeMap<Ticket, Waiting>,
    placed: BTreeMap<Ticket, Placed>,
}

impl Router {
    /// For these groups, all of them closed.
    pub fn new(shapes: impl IntoIterator<Item = GroupShape>) -> Self {
        let groups = shapes.into_iter().map(|shape| Group { shape, is_open: false }).collect();
        Self { groups, waiting: BTreeMap::new(), placed: BTreeMap::new() }
    }

    /// Whether a group can be given documents now.
    pub fn set_open(&mut self, group: usize, is_open: bool) {
        self.groups[group].is_open = is_open;
    }

    /// What a group has of memory and places, where that is learned later.
    pub fn set_shape(&mut self, group: usize, change: impl FnOnce(&mut GroupShape)) {
        change(&mut self.groups[group].shape);
    }

    /// A document comes that fits nowhere, as far as is known.
    pub fn arrive(&mut self, ticket: Ticket) {
        let offers = vec![None; self.groups.len()];
        self.waiting.insert(ticket, Waiting { offers, overtaken: 0 });
    }

    /// What a waiting document would take of a group.
    pub fn offer(&mut self, ticket: Ticket, group: usize, offer: Offer) {
        if let Some(waiting) = self.waiting.get_mut(&ticket) {
            waiting.offers[group] = Some(offer);
        }
    }

    /// Documents that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Documents that wait although they were offered to some group, and that do not fit into `group`.
    pub fn waiting_for_others(&self, group: usize) -> usize {
        let waits = |waiting: &&Waiting| waiting.offers[group].is_none() && waiting.offers.iter().any(Option::is_some);
        self.waiting.values().filter(waits).count()
    }

    /// Where a document is, if it was placed.
    pub fn place(&self, ticket: Ticket) -> Option<usize> {
        self.placed.get(&ticket).map(|placed| placed.group)
    }

    /// The prefill of a placed document is so far, from 0 (it begins) to 1.
    pub fn prefilled(&mut self, ticket: Ticket, part: f64) {
        if let Some(placed) = self.placed.get_mut(&ticket) {
            placed.left = Some((1.0 - part).clamp(0.0, 1.0));
        }
    }

    /// A placed document has come back undone, and waits again.
    pub fn take_back(&mut self, ticket: Ticket) {
        if let Some(placed) = self.placed.remove(&ticket) {
            self.waiting.insert(ticket, placed.waiting);
        }
    }

    /// A document has ended, or is not wanted any more.
    pub fn leave(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
        self.placed.remove(&ticket);
    }

    /// What a group has in hand.
    pub fn load(&self, group: usize) -> Load {
        let mut load = Load { takes_up_to_s: f64::INFINITY, ..Load::default() };
        let (mut running_s, mut ahead) = (0.0f64, Vec::new());
        for placed in self.placed.values().filter(|placed| placed.group == group) {
            load.documents += 1;
            load.kept_bytes = load.kept_bytes.saturating_add(placed.offer.kept_bytes);
            if placed.left != Some(0.0) {
                load.transient_bytes = load.transient_bytes.max(placed.offer.transient_bytes);
            }
            let left_s = placed.left.unwrap_or(1.0) * placed.offer.seconds;
            load.backlog_s += left_s;
            match placed.left {
                Some(_) => running_s = running_s.max(left_s),
                None => ahead.push(left_s),
            }
        }
        let short_s = SHORT_PART * running_s;
        for ahead_s in ahead {
            load.takes_up_to_s = if ahead_s <= short_s { -1.0 } else { load.takes_up_to_s.min(short_s) };
        }
        load
    }

    /// The next document that can go somewhere, and where; it has gone there then. Ask until there is none.
    pub fn place_next(&mut self) -> Option<(Ticket, usize)> {
        let mut kept_free = vec![false; self.groups.len()];
        let loads: Vec<Load> = (0..self.groups.len()).map(|group| self.load(group)).collect();
        let tickets: Vec<Ticket> = self.waiting.keys().copied().collect();
        for ticket in tickets {
            let waiting = &self.waiting[&ticket];
            if let Some(group) = self.destination(waiting, &loads, &kept_free) {
                self.go(ticket, group);
                return Some((ticket, group));
            }
            if waiting.overtaken >= OVERTAKEN_AT_MOST
                && let Some(group) = self.largest(waiting)
            {
                kept_free[group] = true;
            }
        }
        None
    }

    /// Where a document goes now, if it can.
    fn destination(&self, waiting: &Waiting, loads: &[Load], kept_free: &[bool]) -> Option<usize> {
        let can = |group: usize| {
            let (offer, load) = (waiting.offers[group]?, &loads[group]);
            let shape = &self.groups[group].shape;
            let transient_bytes = load.transient_bytes.max(offer.transient_bytes);
            let needed_bytes = load.kept_bytes.saturating_add(offer.kept_bytes).saturating_add(transient_bytes);
            let has_room = load.documents < shape.slots && needed_bytes <= shape.memory_bytes;
            let can = self.groups[group].is_open && !kept_free[group] && (has_room || load.documents == 0);
            can.then_some((group, offer.seconds, load))
        };
        let open = || (0..self.groups.len()).filter_map(can);
        let idle = open().filter(|(_, _, load)| load.documents == 0);
        if let Some((group, ..)) = idle.min_by_key(|(group, ..)| (self.groups[*group].shape.ranks, *group)) {
            return Some(group);
        }
        let taking = open().filter(|(_, seconds, load)| *seconds <= load.takes_up_to_s);
        let end = |seconds: f64, load: &Load| load.backlog_s + seconds;
        taking.min_by(|one, other| end(one.1, one.2).total_cmp(&end(other.1, other.2))).map(|(group, ..)| group)
    }

    /// The largest open group that a document fits into.
    fn largest(&self, waiting: &Waiting) -> Option<usize> {
        let fits = |group: &usize| self.groups[*group].is_open && waiting.offers[*group].is_some();
        (0..self.groups.len()).filter(fits).max_by_key(|group| (self.groups[*group].shape.ranks, *group))
    }

    fn go(&mut self, ticket: Ticket, group: usize) {
        for (_, older) in self.waiting.range_mut(..ticket) {
            older.overtaken += u32::from(older.offers[group].is_some());
        }
        if let Some(waiting) = self.waiting.remove(&ticket)
            && let Some(offer) = waiting.offers[group]
        {
            self.placed.insert(ticket, Placed { group, waiting, offer, left: None });
        }
    }
}
