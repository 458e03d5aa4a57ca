//! Ranks of several nodes, here as threads that know nothing of each other but the hub's address, pass the conformance suite; and what only a
//! network can do wrong.

use std::iter;
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::wire::{self, Say, Seat, Tell};
use super::{BEAT, Heard, Orders, Place, SILENCE, Side};
use crate::comm::call::Call;
use crate::comm::conformance::{self, PATIENT};
use crate::comm::local::LocalComm;
use crate::comm::local::tests::Ends;

/// What comes with the ends, kept to the end of the process.
static SIDES: Mutex<Vec<Side>> = Mutex::new(Vec::new());

fn place(nodes: usize, start: Duration) -> Place {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    Place { node: 0, nodes, listen: address.clone(), address, token: "secret".to_owned(), start }
}

fn at(place: &Place, node: usize) -> Place {
    Place { node, ..place.clone() }
}

/// Every rank a node of its own.
fn nodes(size: usize, deadline: Duration) -> Vec<LocalComm> {
    let first = place(size, PATIENT);
    std::thread::scope(|scope| {
        let come = |node| {
            let place = at(&first, node);
            scope.spawn(move || {
                let (mut ends, side) = LocalComm::group_at(&place, 1, deadline).unwrap();
                SIDES.lock().unwrap().push(side);
                ends.remove(0)
            })
        };
        let nodes: Vec<_> = (0..size).map(come).collect();
        nodes.into_iter().map(|node| node.join().unwrap()).collect()
    })
}

macro_rules! over_the_hub {
    ($($test:ident: $needed:literal,)*) => {
        $(#[test] fn $test() { conformance::$test(&Ends(nodes)); })*
    };
}
conformance::with_functions!(over_the_hub);

#[test]
fn a_node_that_never_comes_is_named_on_the_first_node_and_on_those_that_came() {
    let (first, start) = (place(3, Duration::from_millis(500)), Instant::now());
    let second = at(&first, 1);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| LocalComm::group_at(&second, 1, PATIENT).map(drop));
        let refused = LocalComm::group_at(&first, 1, PATIENT).map(drop).unwrap_err().to_string();
        // The second may have come by then.
        assert!(refused.contains("of 3 nodes number") && refused.contains("2 did not come within"), "{refused}");
        assert!(waits.join().unwrap().is_err());
    });
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_hub_that_is_never_there_is_said_so() {
    let nowhere = at(&place(2, Duration::from_millis(300)), 1);
    let refused = LocalComm::group_at(&nowhere, 1, PATIENT).map(drop).unwrap_err().to_string();
    assert!(refused.contains(&nowhere.address) && refused.contains("was not there"), "{refused}");
}

#[test]
fn a_stranger_and_a_node_of_another_size_are_refused() {
    let first = place(2, Duration::from_secs(3));
    let hub = {
        let first = first.clone();
        std::thread::spawn(move || LocalComm::group_at(&first, 1, PATIENT).map(drop))
    };
    let stranger = Place { token: "guessed".to_owned(), ..at(&first, 1) };
    let refused = LocalComm::group_at(&stranger, 1, PATIENT).map(drop).unwrap_err().to_string();
    assert!(refused.contains("token"), "{refused}");
    let refused = LocalComm::group_at(&at(&first, 1), 2, PATIENT).map(drop).unwrap_err().to_string();
    assert!(refused.contains("4 ranks in all on one, 2 on the first"), "{refused}");
    assert!(hub.join().unwrap().is_err());
}

#[test]
fn orders_come_as_they_were_given_and_end_with_the_hub() {
    let first = place(2, PATIENT);
    let second = at(&first, 1);
    std::thread::scope(|scope| {
        let node = scope.spawn(|| match LocalComm::group_at(&second, 1, PATIENT).unwrap() {
            (_ends, Side::Other(mut told)) => {
                let orders = iter::from_fn(|| told.hear()).filter_map(|heard| match heard {
                    Heard::Order(order) => Some(order),
                    Heard::Beat => None,
                });
                orders.collect::<Vec<_>>()
            }
            _ => panic!("the second node is not the first"),
        });
        let (_ends, Side::First(mut hub)) = LocalComm::group_at(&first, 1, PATIENT).unwrap() else {
            panic!("the first node has the hub")
        };
        let orders = hub.take_orders();
        assert_eq!(orders.iter().map(Orders::node).collect::<Vec<_>>(), [1]);
        assert!((0..3).all(|i| orders[0].send(serde_json::json!({ "step": i }))));
        drop(orders);
        let told = node.join().unwrap();
        assert_eq!(told.iter().map(|order| order["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
    });
}

#[test]
fn a_rank_that_waits_for_others_hears_of_the_hub_meanwhile_and_of_who_comes_further() {
    let first = place(2, PATIENT);
    std::thread::scope(|scope| {
        let node = scope.spawn(|| {
            let sit = |seat| {
                let mut stream = (0..500).find_map(|_| {
                    std::thread::sleep(Duration::from_millis(10));
                    TcpStream::connect(&first.address).ok()
                });
                let stream = stream.as_mut().unwrap();
                let hello = Say::Hello { token: first.token.clone(), seat, size: 2 };
                wire::write(stream, &hello, &[]).unwrap();
                stream.try_clone().unwrap()
            };
            let (mut rank, _orders) = (sit(Seat::Rank(1)), sit(Seat::Node(1)));
            assert!(matches!(wire::read(&mut rank).unwrap().0, Tell::Welcome { .. }));
            // It comes to a round to which the first node does not come.
            let (mut says, call, asked) = (rank.try_clone().unwrap(), Call::Barrier, Instant::now());
            wire::write(&mut rank, &Say::Deposit { round: 0, call, value: 0, awaited: true }, &[]).unwrap();
            let mut quiet_since = |came: Instant| match wire::read(&mut rank).unwrap().0 {
                Tell::Quiet { ms } => assert!(Duration::from_millis(ms) <= came.elapsed(), "{ms} ms"),
                other => panic!("{other:?}"),
            };
            quiet_since(asked);
            let (waited, further) = (asked.elapsed(), Instant::now());
            wire::write(&mut says, &Say::Further, &[]).unwrap();
            quiet_since(further);
            waited
        });
        let (_ends, _side) = LocalComm::group_at(&first, 1, PATIENT).unwrap();
        let waited = node.join().unwrap();
        assert!(waited >= BEAT && waited < SILENCE, "{waited:?}");
    });
}
