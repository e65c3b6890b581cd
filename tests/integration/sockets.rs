//! What strangers do to a node's sockets, whom it lets in, and how many (row 30).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::Must;
use crate::support::device::{Device, token};
use crate::support::fleet::{HANDSHAKE, masked};
use crate::support::sender::request;
use crate::support::stack::Stack;
use crate::support::{SOON, until};

/// What came back on a raw connection until it ended.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// The first line of the HTTP answer, if there was one.
    http: String,
    /// The codes of the error frames.
    errors: Vec<u64>,
    /// The code of the close frame, and its reason.
    close: Option<(u16, String)>,
}

fn connect(node: &Process) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", node.public_port())).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// Connects from another address of this machine.
fn connect_from(node: &Process, address: [u8; 4]) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
    socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, node.public_port())).into()).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.into()
}

/// Reads until the other side closes, and takes apart what came. A reset after the answer is an end like another.
fn answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::WouldBlock,
            "it was not closed: {:?}",
            String::from_utf8_lossy(&bytes)
        );
    }
    let mut answer = Answer { http: String::new(), errors: Vec::new(), close: None };
    if bytes.is_empty() {
        return answer;
    }
    let end = bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("an HTTP answer");
    answer.http = String::from_utf8_lossy(&bytes[..end]).lines().next().unwrap().to_owned();
    let mut rest = &bytes[end + 4..];
    while let [first, second, after @ ..] = rest {
        let (length, payload) = match second {
            126 => (usize::from(u16::from_be_bytes([after[0], after[1]])), &after[2..]),
            short => (usize::from(*short), after),
        };
        let payload = &payload[..length];
        match first {
            0x81 => {
                let frame: serde_json::Value = serde_json::from_slice(payload).unwrap();
                answer.errors.extend(frame["code"].as_u64());
            }
            0x88 => {
                assert!(answer.close.is_none(), "two close frames");
                let reason = String::from_utf8(payload[2..].to_vec()).unwrap();
                answer.close = Some((u16::from_be_bytes([payload[0], payload[1]]), reason));
            }
            other => assert!(matches!(other, 0x89 | 0x8a), "a frame that begins with {other:02x}"),
        }
        rest = &rest[rest.len() - (after.len() - (payload.as_ptr() as usize - after.as_ptr() as usize) - length)..];
    }
    answer
}

/// What is told on a WebSocket where, after the handshake and whatever else, these bytes were sent.
fn told(node: &Process, pieces: &[&[u8]]) -> Answer {
    let mut stream = connect(node);
    stream.write_all(HANDSHAKE).unwrap();
    for piece in pieces {
        // Whoever has been closed already cannot send on.
        let _ = stream.write_all(piece);
    }
    answer(stream)
}

fn login(app: &App) -> Vec<u8> {
    let token = token(&app.key, "raw", &app.secret, 60);
    let login = serde_json::json!({
        "type": "login", "app": app.key, "account": "raw", "device": "d", "platform": "web", "token": token,
    });
    masked(1, login.to_string().as_bytes())
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols";

/// Row 30, and that nobody else notices: a neighbour stays, and has what is broadcast between the attempts.
#[tokio::test]
async fn each_breach_of_the_protocol_has_its_close_code_and_the_neighbour_notices_nothing() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { stack.role("node").with("node.login_seconds", "3").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let mut neighbour = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;

    let long = [&[0x81, 0xfe, 0x10, 0x01, 0, 0, 0, 0][..], &[b'x'; 4097]].concat();
    let part = [&[0x01, 0xfe, 0x08, 0x00, 0, 0, 0, 0][..], &[b'x'; 2048]].concat();
    let more = [&[0x00, 0xfe, 0x08, 0x01, 0, 0, 0, 0][..], &[b'x'; 2049]].concat();
    let fragments = [&part[..], &more].concat();
    let garbage: Vec<u8> = (0..5000u32).map(|number| (number * 131 % 251) as u8 | 0x70).collect();
    let frames: &[(&str, &[u8], u16)] = &[
        ("unmasked", b"\x81\x01x", 1002),
        ("garbage", &garbage, 1002),
        ("a reserved bit", b"\xc1\x80\0\0\0\0", 1002),
        ("all reserved bits", b"\xf1\x80\0\0\0\0", 1002),
        ("a reserved opcode", b"\x83\x80\0\0\0\0", 1002),
        ("a reserved control opcode", b"\x8b\x80\0\0\0\0", 1002),
        ("a fragmented ping", b"\x09\x80\0\0\0\0", 1002),
        ("a fragmented close", b"\x08\x80\0\0\0\0", 1002),
        ("a ping of 126 bytes", b"\x89\xfe\0\x7e\0\0\0\0", 1002),
        ("a continuation of nothing", b"\x80\x80\0\0\0\0", 1002),
        ("a message within a message", b"\x01\x81\0\0\0\0x\x81\x81\0\0\0\0x", 1002),
        ("binary", b"\x82\x81\0\0\0\0x", 1003),
        ("text that is not UTF-8", b"\x81\x82\0\0\0\0\xc3\x28", 1007),
        ("UTF-8 that ends in the middle", b"\x01\x81\0\0\0\0\xe2\x80\x82\0\0\0\0\x82\x28", 1007),
        ("a close reason that is not UTF-8", b"\x88\x83\0\0\0\0\x03\xe8\xff", 1007),
        ("a close code of one byte", b"\x88\x81\0\0\0\0\x03", 1002),
        ("the close code 0", b"\x88\x82\0\0\0\0\0\0", 1002),
        ("the close code 999", b"\x88\x82\0\0\0\0\x03\xe7", 1002),
        ("the close code 1005", b"\x88\x82\0\0\0\0\x03\xed", 1002),
        ("the close code 1006", b"\x88\x82\0\0\0\0\x03\xee", 1002),
        ("the close code 2000", b"\x88\x82\0\0\0\0\x07\xd0", 1002),
        ("the close code 5000", b"\x88\x82\0\0\0\0\x13\x88", 1002),
        ("4097 bytes", &long, 1009),
        ("2^63 bytes", b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff", 1009),
        ("fragments of 4097 bytes", &fragments, 1009),
    ];
    let login = login(&app);
    for (number, (name, bytes, code)) in frames.iter().enumerate() {
        for pieces in [&[bytes][..], &[&&login[..], bytes]] {
            let pieces: Vec<&[u8]> = pieces.iter().map(|piece| **piece).collect();
            let told = told(&node, &pieces);
            assert_eq!(told.http, SWITCHED, "{name}");
            assert_eq!((told.errors, told.close), (vec![414], Some((*code, String::new()))), "{name}");
        }
        if number % 5 == 0 {
            amqp.accepted(&request(&app, name)).await;
            assert_eq!(neighbour.contents_up_to(name).await, [*name], "the neighbour");
        }
    }
    // A close in good order is answered with its own code, or 1000.
    for (bytes, code) in
        [(&b"\x88\x82\0\0\0\0\x03\xe9"[..], 1001), (b"\x88\x80\0\0\0\0", 1000), (b"\x88\x82\0\0\0\0\x0f\xa0", 4000)]
    {
        let told = told(&node, &[&login, bytes]);
        assert_eq!((told.errors, told.close), (vec![], Some((code, String::new()))));
    }
    // A login is one message of text; anything else, and anything after it, is refused.
    for (bytes, code) in
        [(&masked(1, b"hello")[..], 414), (&masked(1, &[b'['; 4096]), 414), (&[&login[..], &login].concat(), 414)]
    {
        let told = told(&node, &[bytes]);
        assert_eq!((told.errors, told.close), (vec![code], Some((1008, String::new()))));
    }
    assert_eq!(node.metric("broadcastd_sessions").await, 1.0, "only the neighbour is left");
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(neighbour.contents_up_to("end").await, ["end"]);
    after_row(&stack).await.device(neighbour.history(), Must::Everything, 0).unwrap();
}

/// Row 30: requests that are none, and those who take their time.
#[tokio::test]
async fn bad_and_slow_handshakes_are_answered_or_closed_in_time() {
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = async { stack.role("node").with("node.login_seconds", "2").start().await };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let mut neighbour = Device::online(&app, "web", &node.device_url()).await;

    let huge = format!("GET /ws HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(9000));
    let many = format!("GET /ws HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(65));
    let endless = "x".repeat(100_000);
    for (request, status) in [
        ("\u{1}\u{2}\u{3}\r\n\r\n", "400"),
        ("GET /ws HTTP/1.1\r\n\r\n", "426"),
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        (&huge, "431"),
        (&many, "431"),
        (&endless, "431"),
    ] {
        let mut stream = connect(&node);
        let _ = stream.write_all(request.as_bytes());
        let answer = answer(stream);
        assert_eq!(answer.http.split(' ').nth(1), Some(status), "{answer:?}");
    }

    // A byte now and then does not put the end off.
    let mut slow = connect(&node);
    let mut dripping = slow.try_clone().unwrap();
    let drip = std::thread::spawn(move || {
        HANDSHAKE.iter().take_while(|byte| dripping.write_all(&[**byte]).is_ok() && pause()).count()
    });
    let silent = connect(&node);
    let mut upgraded = connect(&node);
    upgraded.write_all(HANDSHAKE).unwrap();
    let mut half = connect(&node);
    half.write_all(HANDSHAKE).unwrap();
    half.write_all(&login(&app)[..20]).unwrap();
    let nothing = Answer { http: String::new(), errors: Vec::new(), close: None };
    assert_eq!(answer(silent), nothing);
    let mut bytes = Vec::new();
    let _ = slow.read_to_end(&mut bytes);
    assert!(bytes.is_empty() && drip.join().unwrap() < HANDSHAKE.len(), "the slow one got through");
    for late in [upgraded, half] {
        let told = answer(late);
        assert_eq!((told.http.as_str(), told.errors, told.close), (SWITCHED, vec![408], Some((1008, String::new()))));
    }
    let metrics = node.metrics().await;
    for (reason, count) in [("no_request", 2), ("no_login", 2), ("head_too_large", 3), ("bad_request", 1)] {
        let line = format!("broadcastd_connections_refused_total{{reason=\"{reason}\"}} {count}");
        assert!(metrics.lines().any(|have| have == line), "no {line}");
    }
    let amqp = stack.amqp().await;
    amqp.accepted(&request(&app, "end")).await;
    assert_eq!(neighbour.contents_up_to("end").await, ["end"]);
    after_row(&stack).await.device(neighbour.history(), Must::Everything, 0).unwrap();
}

/// The pace of one who sends a byte at a time: a whole handshake would take half a minute.
fn pause() -> bool {
    std::thread::sleep(Duration::from_millis(200));
    true
}

/// A page from another site cannot open a socket in its visitor's name.
#[tokio::test]
async fn browsers_come_in_from_allowed_origins_only() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = stack.role("node").settings("[node]\nallowed_origins = [\"https://good.example\"]\n").start().await;
    for (origin, status) in [
        ("Origin: https://good.example\r\n", "101"),
        ("Origin: HTTPS://GOOD.example\r\n", "101"),
        ("", "101"),
        ("Origin: https://evil.example\r\n", "403"),
        ("Origin: http://good.example\r\n", "403"),
        ("Origin: https://good.example.evil.example\r\n", "403"),
        ("Origin: null\r\n", "403"),
        ("Origin: https://evil.example\r\nOrigin: https://good.example\r\n", "403"),
        ("Origin: https://good.example\r\nOrigin: https://evil.example\r\n", "403"),
        ("Origin: \u{e9}\r\n", "403"),
    ] {
        let handshake = String::from_utf8_lossy(HANDSHAKE).replace("Host:", &format!("{origin}Host:"));
        let mut stream = connect(&node);
        stream.write_all(handshake.as_bytes()).unwrap();
        stream.write_all(b"\x88\x80\0\0\0\0").unwrap();
        let answer = answer(stream);
        assert_eq!(answer.http.split(' ').nth(1), Some(status), "{origin:?}: {answer:?}");
    }
    assert!(node.metrics().await.contains("broadcastd_connections_refused_total{reason=\"origin\"} 7"));
}

/// Opens connections from an address until one is refused; how many were not.
fn fill(node: &Process, address: [u8; 4], kept: &mut Vec<TcpStream>) -> (usize, String) {
    for count in 0.. {
        let mut stream = connect_from(node, address);
        let _ = stream.write_all(HANDSHAKE);
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        if &first != b"HTTP/1.1 101" {
            return (count, String::from_utf8_lossy(&first[9..]).into_owned());
        }
        kept.push(stream);
    }
    unreachable!()
}

/// However a connection ends, its place is free again, once.
#[tokio::test]
async fn an_address_has_as_many_connections_as_it_may() {
    const MOST: usize = 8;
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let node = stack.role("node").with("node.max_sessions_per_address", MOST.to_string());
    let node = node.with("node.login_seconds", "2").start().await;
    let here = [127, 0, 0, 2];
    let free_again = async || {
        until("all places free", SOON, async || {
            let mut kept = Vec::new();
            match fill(&node, here, &mut kept).0 {
                MOST => Ok(()),
                places => Err(places),
            }
        })
        .await;
    };
    let mut kept = Vec::new();
    assert_eq!(fill(&node, here, &mut kept), (MOST, "429".to_owned()));
    // Another address has places of its own.
    assert_eq!(fill(&node, [127, 0, 0, 3], &mut Vec::new()), (MOST, "429".to_owned()));

    // Gone, without a word.
    kept.clear();
    free_again().await;
    // By all other ways: a close frame, a breach, a login that is refused, one that never comes, a request that is none.
    let bad = masked(1, b"hello");
    for bytes in [&b"\x88\x80\0\0\0\0"[..], b"\x81\x01x", &bad, b""] {
        fill(&node, here, &mut kept);
        for mut stream in kept.drain(..) {
            stream.write_all(bytes).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
        free_again().await;
    }
    for _ in 0..2 * MOST {
        let mut stream = connect_from(&node, here);
        let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
        let _ = stream.read_to_end(&mut Vec::new());
    }
    free_again().await;
    // Logged in, and then gone or at fault.
    for bytes in [&b"\x88\x80\0\0\0\0"[..], b"\x82\x80\0\0\0\0"] {
        fill(&node, here, &mut kept);
        for stream in &mut kept {
            stream.write_all(&login(&app)).unwrap();
        }
        for mut stream in kept.drain(..) {
            stream.write_all(bytes).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        }
        free_again().await;
    }
    assert!(node.metrics().await.contains("reason=\"address_full\""));
}

/// An app that fills its places is told so; another one's devices come in.
#[tokio::test]
async fn an_app_has_as_many_sessions_as_it_may() {
    let (full, other) = (App::new(), App::new());
    let stack = Stack::new(&[full.clone(), other.clone()]);
    let node = stack.role("node").with("node.max_sessions_per_app", "3").start().await;
    let url = node.device_url();
    let mut devices = Vec::new();
    for _ in 0..3 {
        devices.push(Device::online(&full, "web", &url).await);
    }
    for _ in 0..3 {
        let told = told(&node, &[&login(&full)]);
        let Some((1013, reason)) = told.close else { panic!("{told:?}") };
        assert_eq!(told.errors, [503]);
        let hint: serde_json::Value = serde_json::from_str(&reason).unwrap();
        assert!((100..=30_000).contains(&hint["reconnectAfterMs"].as_u64().unwrap()), "{hint}");
    }
    for _ in 0..3 {
        devices.push(Device::online(&other, "web", &url).await);
    }
    assert_eq!(node.metric("broadcastd_sessions").await, 6.0);
    // A place that is given back is free once.
    devices[0].drop_connection();
    let mut next = Device::new(&full, "web");
    until("a free place", SOON, async || next.try_login(&url).await).await;
    assert!(Device::new(&full, "web").try_login(&url).await.is_err());
    assert!(node.metrics().await.contains("broadcastd_connections_refused_total{reason=\"app_full\"}"));
}

/// Row 31, small: what comes at once is let in at the set pace, and waits in the listen queue until then.
#[tokio::test]
async fn a_storm_is_let_in_at_the_set_pace_and_the_rest_waits() {
    const PACE: u32 = 20;
    const STORM: usize = 300;
    // Each shard has a share of the pace, and may let in one at once.
    const SHARDS: u32 = 2;
    let stack = Stack::new(&[App::new()]);
    let node = stack.role("node").with("node.accept_per_second", PACE.to_string());
    let node = node.with("node.shards", SHARDS.to_string()).start().await;
    let start = Instant::now();
    let _storm: Vec<TcpStream> = (0..STORM).map(|_| connect(&node)).collect();
    let accepted = node.metric("broadcastd_connections_total").await;
    // The standard library's queue is 128 long: the others would not be connected before some of these are accepted.
    assert!(accepted < (STORM - 128) as f64, "{accepted} accepted after {:?}", start.elapsed());
    until("60 accepted", SOON, async || {
        let accepted = node.metric("broadcastd_connections_total").await;
        let most = f64::from(PACE) * start.elapsed().as_secs_f64() + f64::from(SHARDS);
        assert!(accepted <= most, "{accepted} accepted after {:?}", start.elapsed());
        if accepted >= 60.0 { Ok(()) } else { Err(accepted) }
    })
    .await;
}
