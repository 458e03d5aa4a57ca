//! Where the nodes of a group meet: what was said last is what is found, while it holds.

use std::time::Duration;

use crate::suite::Fresh;

pub async fn nodes_find_the_first_one_while_it_waits(fresh: Fresh) {
    let store = &fresh.store;
    let look = async |address: &str| store.meeting_look(address).await.expect("looked");
    assert_eq!(look("one:7443").await, None);
    store.meeting_say("one:7443", "first start", Duration::from_secs(60)).await.expect("said");
    store.meeting_say("two:7443", "another group", Duration::from_secs(60)).await.expect("said");
    assert_eq!(look("one:7443").await.as_deref(), Some("first start"));
    store.meeting_say("one:7443", "second start", Duration::from_millis(300)).await.expect("said");
    assert_eq!(look("one:7443").await.as_deref(), Some("second start"));
    tokio::time::sleep(Duration::from_millis(350)).await;
    assert_eq!(look("one:7443").await, None, "nobody waits there any more");
    assert_eq!(look("two:7443").await.as_deref(), Some("another group"));
}
