//! What a whole node does too rarely to be tested there.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use super::*;
use crate::metrics::Metrics;
use crate::node::clock::LedgerClock;
use crate::node::login::Apps;
use crate::node::settings::NodeSettings;
use crate::node::shared::Desk;
use crate::node::testing::directory;
use crate::node::timeline::{Bounds, Timeline};

fn shard() -> Shard {
    let apps = Apps::new(&directory(), true);
    let shared = Shared {
        settings: NodeSettings::for_tests(),
        desk: Desk::new(apps.len()),
        apps,
        clock: LedgerClock::new(),
        metrics: Metrics::new().unwrap(),
        http: None,
        connections: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
    };
    Shard::new(0, Arc::new(shared)).unwrap().0
}

/// Lets a device in; returns its side of the connection, and its token.
fn device(shard: &mut Shard) -> (std::net::TcpStream, Token) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let ours = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    shard.obey(Message::Connection(mio::net::TcpStream::from_std(ours)));
    let (place, session) = shard.sessions.iter().last().unwrap();
    (theirs, token(place, session.generation))
}

const LOGIN: &str = r#"{"type":"login","app":"demo","account":"a","device":"d","platform":"web"}"#;

#[tokio::test]
async fn an_app_that_is_closed_while_a_device_logs_in_is_asked_for_again() {
    let mut shard = shard();
    let app = shard.shared.apps.find("demo").unwrap();
    let timeline = || Box::new(Timeline::new(Bounds { frames: 10, bytes: 1000 }, 5));
    shard.obey(Message::Open { app, timeline: timeline() });
    let (_socket, token) = device(&mut shard);
    shard.session(token).unwrap().state = State::Login;
    shard.log_in(token, LOGIN);
    assert_eq!(shard.session(token).unwrap().state, State::Open);
    shard.obey(Message::Close { app });
    assert_eq!(shard.shared.desk.wanted().await, [app]);
    // Once nobody is there, it is let go.
    shard.remove(token, "left");
    shard.obey(Message::Close { app });
    assert!(shard.views[app as usize].timeline.is_none());
}

#[test]
fn an_event_for_an_earlier_connection_in_the_same_place_does_nothing() {
    let mut shard = shard();
    let (_first, old) = device(&mut shard);
    shard.remove(old, "left");
    let (_second, new) = device(&mut shard);
    assert_eq!(key(old), key(new), "the place is used again");
    shard.remove(old, "left");
    shard.read(old, true);
    shard.flush(old);
    assert!(shard.session(new).is_some() && shard.session(old).is_none());
}

#[test]
fn a_device_waits_for_its_app_and_is_then_welcomed() {
    let mut shard = shard();
    let app = shard.shared.apps.find("demo").unwrap();
    let (_socket, token) = device(&mut shard);
    shard.session(token).unwrap().state = State::Login;
    shard.log_in(token, LOGIN);
    assert_eq!(shard.session(token).unwrap().state, State::Waiting);
    assert!(shard.views[app as usize].is_wanted);
    let timeline = Box::new(Timeline::new(Bounds { frames: 10, bytes: 1000 }, 5));
    shard.obey(Message::Open { app, timeline });
    shard.sweep();
    assert_eq!(shard.session(token).unwrap().state, State::Open);
    assert_eq!(shard.session(token).unwrap().cursor, 5);
}
