//! What depends on moments that a whole node cannot be brought to on purpose.

use super::operations::Position;
use super::*;
use crate::metrics::Metrics;
use crate::node::entry::tests::broadcast;
use crate::node::settings::NodeSettings;
use crate::node::testing::{FakeLedger, directory};
use crate::node::timeline::Timeline;

const NOW: u64 = 1_000;

/// With `demo` open at 10.
fn presence() -> (Presence, AppIndex) {
    let shared = Arc::new(Shared::for_tests(NodeSettings::for_tests(), &directory(), Metrics::new().unwrap()));
    let index = shared.apps.find("demo").unwrap();
    let (ready, _) = watch::channel(Ok(()));
    let (_, is_draining) = watch::channel(false);
    let mut presence = Presence::new(shared, FakeLedger::new(), NodeName("n".into()), Vec::new(), ready, is_draining);
    let mut app = App::new(AppKey::parse("demo").unwrap(), 1);
    app.timeline = Some(Timeline::new(Bounds { frames: 10, bytes: 1000 }, 10));
    presence.apps.insert(index, app);
    (presence, index)
}

#[test]
fn what_may_still_be_in_the_feed_is_not_read_past() {
    let (mut presence, demo) = presence();
    let since = Position { last: 10, taken: 0 };
    presence.take_overdue(demo, 15, since, true);
    assert!(!presence.apps[&demo].is_reading && presence.operations.len() == 1, "waits for the feed");
    presence.apps.get_mut(&demo).unwrap().timeline.as_mut().unwrap().append(broadcast(12, 10, NOW, 0), NOW);
    presence.take_overdue(demo, 15, since, false);
    assert!(!presence.apps[&demo].is_reading && presence.operations.len() == 2, "it moves");
    presence.take_overdue(demo, 15, Position { last: 12, taken: 0 }, false);
    assert!(presence.apps[&demo].is_reading);
}

#[test]
fn others_that_fill_the_feed_do_not_put_it_off_for_ever() {
    let (mut presence, demo) = presence();
    presence.taken = 5000;
    presence.take_overdue(demo, 15, Position { last: 10, taken: 0 }, true);
    assert!(presence.apps[&demo].is_reading);
}

#[test]
fn an_app_that_is_given_up_is_not_read() {
    let (mut presence, demo) = presence();
    presence.apps.get_mut(&demo).unwrap().closing = Some(false);
    presence.read(demo);
    assert!(!presence.apps[&demo].is_reading && presence.operations.is_empty());
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_an_app_that_was_opened_again() {
    let (mut presence, demo) = presence();
    let app = presence.apps.get_mut(&demo).unwrap();
    app.timeline = None;
    let mut late = app.wanted(demo);
    late.incarnation = 0;
    let caller = presence.caller.clone();
    presence.settle(caller.read(late, 0, Duration::ZERO).await, false).await;
    assert!(presence.apps[&demo].timeline.is_none());
    let wanted = presence.apps[&demo].wanted(demo);
    presence.settle(caller.read(wanted, 0, Duration::ZERO).await, false).await;
    assert!(presence.apps[&demo].timeline.is_some());
}

#[test]
fn what_is_unreadable_of_one_app_does_not_make_the_node_unready() {
    let (mut presence, demo) = presence();
    presence.note_trouble(demo, &LedgerError::Corrupt("secret".into()));
    assert!(presence.trouble.is_none() && presence.apps[&demo].is_corrupt);
    presence.note_trouble(demo, &LedgerError::Unavailable("down".into()));
    assert!(presence.trouble.is_some());
}
