//! What a whole node does too rarely to be tested there.

use super::*;
use crate::metrics::Metrics;
use crate::node::entry::tests::broadcast;
use crate::node::settings::NodeSettings;
use crate::node::testing::directory;
use crate::node::timeline::{Bounds, Timeline};

fn shard() -> Shard {
    shard_with(NodeSettings::for_tests()).0
}

fn shard_with(settings: NodeSettings) -> (Shard, Sender) {
    let shared = Shared::for_tests(settings, &directory(), Metrics::new().unwrap());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Shard::new(0, listener, 1000, Arc::new(shared)).unwrap()
}

/// Lets a device in; returns its side of the connection, and its token.
fn device(shard: &mut Shard) -> (std::net::TcpStream, Token) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let ours = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    let permit = shard.shared.caps.admit([127, 0, 0, 1].into()).unwrap();
    shard.connect(mio::net::TcpStream::from_std(ours), permit);
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

/// One turn of the poll; how many events it had for sessions.
fn turn(shard: &mut Shard) -> usize {
    let mut events = Events::with_capacity(16);
    shard.poll.poll(&mut events, Some(Duration::from_millis(50))).unwrap();
    let of_sessions: Vec<_> = events.iter().filter(|event| event.token() != BELL && event.token() != DOOR).collect();
    of_sessions.iter().for_each(|event| shard.handle(event));
    of_sessions.len()
}

#[test]
fn who_was_behind_and_is_closed_leaves_the_poll_quiet() {
    use std::io::Read;

    let mut shard = shard();
    let (mut theirs, token) = device(&mut shard);
    theirs.set_nonblocking(true).unwrap();
    let session = shard.session(token).unwrap();
    session.state = State::Waiting;
    session.push(&vec![0; 16 << 20]);
    shard.flush(token);
    let is_behind = |shard: &mut Shard| shard.session(token).unwrap().is_behind;
    assert!(is_behind(&mut shard));
    let mut buffer = vec![0; 1 << 20];
    while is_behind(&mut shard) {
        while theirs.read(&mut buffer).is_ok() {}
        turn(&mut shard);
    }
    // The other side does not close: this one waits for that, and for nothing else.
    shard.finish(token, &crate::node::codec::close(1000, ""), "closed");
    assert_eq!(shard.session(token).unwrap().state, State::Closing);
    assert!((0..20).any(|_| turn(&mut shard) == 0), "it is told again and again that it may write");
}

#[tokio::test]
async fn nobody_who_keeps_up_is_left_behind_however_much_comes_at_once() {
    let settings = NodeSettings { recent_frames: 16, ..NodeSettings::for_tests() };
    let (mut shard, sender) = shard_with(settings);
    let app = shard.shared.apps.find("demo").unwrap();
    let timeline = Box::new(Timeline::new(Bounds { frames: 16, bytes: 1 << 20 }, 5));
    shard.obey(Message::Open { app, timeline });
    let devices: Vec<_> = (0..10)
        .map(|_| {
            let (socket, token) = device(&mut shard);
            shard.session(token).unwrap().state = State::Login;
            shard.log_in(token, LOGIN);
            (socket, token)
        })
        .collect();
    let ids = 6..206;
    let entries: Vec<_> = ids.clone().map(|id| broadcast(id, id - 1, 1, 0)).collect();
    for entry in &entries {
        sender.send(Message::Append { app, entries: vec![entry.clone()].into() }).await;
    }
    let mut turns = 0;
    while shard.put_off.is_some() || !shard.sweeping.is_empty() || turns == 0 {
        shard.take_messages();
        assert!(shard.views[app as usize].told_len() <= 8, "what is remembered is bounded");
        shard.sweep();
        turns += 1;
    }
    assert_eq!(shard.shared.metrics.evicted.get(), 0);
    for (_, token) in &devices {
        assert_eq!(shard.session(*token).unwrap().cursor, 205);
    }
    assert_eq!(shard.delivered, 10 * 200);
    let delivered = &shard.shared.metrics.delivery_seconds;
    assert_eq!(delivered.get_sample_count(), 200, "once a broadcast");
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
