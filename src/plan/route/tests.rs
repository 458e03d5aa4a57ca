use proptest::prelude::*;

use super::*;

fn shape(ranks: usize, slots: usize, memory_bytes: u64) -> GroupShape {
    GroupShape { ranks, slots, memory_bytes }
}

/// A router of these groups, all open.
fn router(shapes: &[GroupShape]) -> Router {
    let mut router = Router::new(shapes.iter().copied());
    (0..shapes.len()).for_each(|group| router.set_open(group, true));
    router
}

/// A document that needs so many bytes, and so many seconds on one device.
fn arrive(router: &mut Router, ticket: Ticket, seconds: f64, bytes: u64) {
    router.arrive(ticket);
    for group in 0..router.groups.len() {
        let shape = router.groups[group].shape;
        if bytes <= shape.memory_bytes {
            // A fifth of it is the prefill's.
            let (seconds, transient_bytes) = (seconds / shape.ranks as f64, bytes / 5);
            router.offer(ticket, group, Offer { seconds, kept_bytes: bytes - transient_bytes, transient_bytes });
        }
    }
}

fn all(router: &mut Router) -> Vec<(Ticket, usize)> {
    std::iter::from_fn(|| router.place_next()).collect()
}

#[test]
fn an_idle_group_comes_first_and_of_those_the_smallest() {
    let mut router = router(&[shape(8, 4, 100), shape(1, 4, 100), shape(1, 4, 10)]);
    arrive(&mut router, 1, 1.0, 20);
    arrive(&mut router, 2, 1.0, 20);
    arrive(&mut router, 3, 1.0, 5);
    assert_eq!(all(&mut router), [(1, 1), (2, 0), (3, 2)]);
}

#[test]
fn of_busy_groups_the_one_that_is_done_first_takes_it() {
    let mut router = router(&[shape(4, 4, 100), shape(1, 4, 100)]);
    arrive(&mut router, 1, 4.0, 10);
    arrive(&mut router, 2, 40.0, 10);
    assert_eq!(all(&mut router), [(1, 1), (2, 0)]);
    router.prefilled(1, 0.5);
    router.prefilled(2, 0.0);
    // 2 s and 1 s of its own on the small group, 10 s and 0.25 s on the other.
    arrive(&mut router, 3, 1.0, 10);
    assert_eq!(all(&mut router), [(3, 1)]);
}

#[test]
fn a_group_takes_one_ahead_and_a_short_one_beside_it() {
    let mut router = router(&[shape(1, 8, 100)]);
    arrive(&mut router, 1, 8.0, 1);
    arrive(&mut router, 2, 6.0, 1);
    assert_eq!(all(&mut router), [(1, 0)]);
    router.prefilled(1, 0.0);
    assert_eq!(all(&mut router), [(2, 0)], "one ahead");
    arrive(&mut router, 3, 6.0, 1);
    arrive(&mut router, 4, 2.0, 1);
    arrive(&mut router, 5, 2.0, 1);
    assert_eq!(all(&mut router), [(4, 0)], "a quarter of what the running one has left");
}

#[test]
fn short_documents_go_round_a_long_one() {
    let mut router = router(&[shape(1, 1, 10), shape(8, 1, 1000)]);
    arrive(&mut router, 1, 1000.0, 1000);
    arrive(&mut router, 2, 1000.0, 1000);
    (3..6).for_each(|ticket| arrive(&mut router, ticket, 1.0, 5));
    assert_eq!(all(&mut router), [(1, 1), (3, 0)]);
    router.leave(3);
    assert_eq!(all(&mut router), [(4, 0)], "the second long one holds up nobody");
}

#[test]
fn a_closed_group_gets_nothing_and_what_comes_back_goes_elsewhere() {
    let mut router = router(&[shape(1, 1, 10), shape(2, 1, 10)]);
    arrive(&mut router, 1, 1.0, 5);
    assert_eq!(all(&mut router), [(1, 0)]);
    router.set_open(0, false);
    router.take_back(1);
    assert_eq!(all(&mut router), [(1, 1)]);
}

/// Short documents come for ever and overlap, so that there is never room for one that needs all the memory.
#[test]
fn a_stream_of_short_documents_starves_no_long_one() {
    let mut router = router(&[shape(1, 4, 100)]);
    arrive(&mut router, 0, 1.0, 50);
    assert_eq!(all(&mut router), [(0, 0)]);
    router.prefilled(0, 1.0);
    arrive(&mut router, 1, 50.0, 100);
    let mut inside = 0;
    for ticket in 2..100 {
        arrive(&mut router, ticket, 1.0, 40);
        let placed = all(&mut router);
        router.leave(inside);
        if placed.is_empty() {
            assert_eq!(all(&mut router), [(1, 0)]);
            assert_eq!(ticket - 2, Ticket::from(OVERTAKEN_AT_MOST));
            return;
        }
        assert_eq!(placed, [(ticket, 0)]);
        router.prefilled(ticket, 1.0);
        inside = ticket;
    }
    panic!("the long one never comes in");
}

/// A document of the simulation.
#[derive(Debug, Clone)]
struct Document {
    comes_s: f64,
    seconds: f64,
    generates_s: f64,
    bytes: u64,
}

/// A group of the simulation: one prefill at a time, in order; generation beside it.
#[derive(Default)]
struct Work {
    ahead: Vec<Ticket>,
    prefills: Option<(Ticket, f64)>,
    generates: Vec<(Ticket, f64)>,
}

impl Work {
    /// Begins the next prefill if none runs; whether it did.
    fn begin(&mut self, now: f64, router: &mut Router, seconds: impl Fn(Ticket) -> f64) -> bool {
        if self.prefills.is_some() || self.ahead.is_empty() {
            return false;
        }
        let ticket = self.ahead.remove(0);
        router.prefilled(ticket, 0.0);
        self.prefills = Some((ticket, now + seconds(ticket)));
        true
    }

    fn next_end(&self) -> Option<f64> {
        self.prefills.iter().chain(&self.generates).map(|(_, end)| *end).min_by(f64::total_cmp)
    }
}

/// Runs all documents through the groups; what was wrong on the way.
fn simulate(shapes: &[GroupShape], documents: &[Document]) -> Result<(), String> {
    let mut router = router(shapes);
    let mut work: Vec<Work> = shapes.iter().map(|_| Work::default()).collect();
    let fits = |document: &Document| shapes.iter().any(|shape| document.bytes <= shape.memory_bytes);
    let (mut to_come, mut left) = (0, documents.iter().filter(|document| fits(document)).count());
    let mut now = 0.0;
    for _ in 0..20 * documents.len() + 20 {
        if left == 0 {
            return Ok(());
        }
        while to_come < documents.len() && documents[to_come].comes_s <= now {
            let document = &documents[to_come];
            if fits(document) {
                arrive(&mut router, to_come as Ticket, document.seconds, document.bytes);
            }
            to_come += 1;
        }
        let next = loop {
            let mut is_settled = true;
            for (ticket, group) in all(&mut router) {
                work[group].ahead.push(ticket);
                is_settled = false;
            }
            check(&router, shapes)?;
            for (work, shape) in work.iter_mut().zip(shapes) {
                let seconds = |ticket: Ticket| documents[ticket as usize].seconds / shape.ranks as f64;
                is_settled &= !work.begin(now, &mut router, seconds);
            }
            if is_settled {
                let comes = documents.get(to_come).map(|document| document.comes_s);
                break work.iter().filter_map(Work::next_end).chain(comes).min_by(f64::total_cmp);
            }
        };
        now = next.ok_or("documents wait for ever")?;
        for work in &mut work {
            if let Some((ticket, end)) = work.prefills
                && end <= now
            {
                router.prefilled(ticket, 1.0);
                work.prefills = None;
                work.generates.push((ticket, now + documents[ticket as usize].generates_s));
            }
            work.generates.retain(|(ticket, end)| {
                if *end <= now {
                    left -= 1;
                    router.leave(*ticket);
                }
                *end > now
            });
        }
    }
    Err(format!("{left} documents have not ended"))
}

/// Memory is never over budget; no group is idle while a document waits that fits into it.
fn check(router: &Router, shapes: &[GroupShape]) -> Result<(), String> {
    for (group, shape) in shapes.iter().enumerate() {
        let load = router.load(group);
        if load.kept_bytes + load.transient_bytes > shape.memory_bytes || load.documents > shape.slots {
            return Err(format!("{load:?} in {shape:?}"));
        }
        let waits = router.waiting.values().any(|waiting| waiting.offers[group].is_some());
        if load.documents == 0 && waits {
            return Err(format!("group {group} is idle while a document waits that fits"));
        }
    }
    Ok(())
}

fn documents() -> impl Strategy<Value = Vec<Document>> {
    let document = (0.0..200.0f64, 0.01..50.0f64, 0.0..5.0f64, 1u64..1000);
    let document =
        document.prop_map(|(comes_s, seconds, generates_s, bytes)| Document { comes_s, seconds, generates_s, bytes });
    proptest::collection::vec(document, 1..60).prop_map(|mut documents| {
        documents.sort_by(|one, other| one.comes_s.total_cmp(&other.comes_s));
        documents
    })
}

proptest! {
    #[test]
    fn every_document_ends_memory_is_kept_and_no_group_idles(
        shapes in proptest::collection::vec((1usize..9, 1usize..9, 1u64..1000), 1..5),
        documents in documents(),
    ) {
        let shapes: Vec<GroupShape> = shapes.into_iter().map(|(ranks, slots, bytes)| shape(ranks, slots, bytes)).collect();
        let simulated = simulate(&shapes, &documents);
        prop_assert!(simulated.is_ok(), "{:?}", simulated);
    }
}
