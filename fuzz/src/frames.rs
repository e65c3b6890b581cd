//! A client's WebSocket frames. The first byte says how they are cut.

use broadcastd::node::codec::{Decoder, Event, Flow, MAX_CLIENT_MESSAGE, Violation};

use super::split_once;

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Text(String),
    Ping(Vec<u8>),
    Pong,
    Close(Option<u16>),
}

/// What a connection saw: the events, how it ended, and whether something is half read.
type Story = (Vec<Seen>, Option<Violation>, bool);

pub fn run(data: &[u8]) {
    let Some((cut, bytes)) = data.split_first() else { return };
    let whole = decode(bytes, |left| left);
    check(&whole, bytes.len());
    assert_eq!(decode(bytes, |_| 1), whole, "byte by byte");
    let mut state = u32::from(*cut) + 1;
    let random = |left: usize| {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        let most = if state & 0x4000_0000 == 0 { 7 } else { 300 };
        (state >> 16) as usize % most % left + 1
    };
    assert_eq!(decode(bytes, random), whole, "cut at random");

    // The login that the bytes are, as a well-behaved client would send it, in one frame and in two.
    let (first, second) = split_once(bytes, b'\n');
    if let (Ok(first), Ok(second)) = (std::str::from_utf8(first), std::str::from_utf8(second)) {
        let text = format!("{first}{second}");
        if text.len() <= MAX_CLIENT_MESSAGE {
            let frames = [client_frame(0x01, first), client_frame(0x89, "?"), client_frame(0x80, second)].concat();
            if first.len() <= 125 && second.len() <= 125 {
                let events = vec![Seen::Ping(b"?".to_vec()), Seen::Text(text)];
                assert_eq!(decode(&frames, |_| 3), (events, None, true));
            }
        }
    }
}

/// A masked frame with a payload of at most 125 bytes.
fn client_frame(first: u8, payload: &str) -> Vec<u8> {
    let mask = [0x9e, 0x37, 0x79, 0xb9];
    let mut frame = vec![first, 0x80 | payload.len() as u8];
    frame.extend(mask);
    frame.extend(payload.bytes().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn decode(bytes: &[u8], mut cut: impl FnMut(usize) -> usize) -> Story {
    let (mut decoder, mut seen, mut closed) = (Decoder::default(), Vec::new(), false);
    let mut rest = bytes;
    while !rest.is_empty() && !closed {
        let (piece, after) = rest.split_at(cut(rest.len()).min(rest.len()));
        rest = after;
        let result = decoder.feed(&mut piece.to_vec(), |event| {
            seen.push(match event {
                Event::Text(text) => Seen::Text(text.to_owned()),
                Event::Ping(payload) => Seen::Ping(payload.to_vec()),
                Event::Pong => Seen::Pong,
                Event::Close(code) => Seen::Close(code),
            });
            closed = matches!(event, Event::Close(_));
            if closed { Flow::Break(()) } else { Flow::Continue(()) }
        });
        if let Err(violation) = result {
            return (seen, Some(violation), true);
        }
    }
    (seen, None, closed || decoder.is_idle())
}

fn check((seen, violation, _): &Story, length: usize) {
    let mut bytes = 0;
    for event in seen {
        bytes += 6 + match event {
            Seen::Text(text) => {
                assert!(text.len() <= MAX_CLIENT_MESSAGE);
                text.len()
            }
            Seen::Ping(payload) => {
                assert!(payload.len() <= 125);
                payload.len()
            }
            Seen::Pong => 0,
            Seen::Close(code) => {
                assert!(code.is_none_or(|code| matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)));
                0
            }
        };
    }
    assert!(bytes <= length, "nothing is made up");
    assert!(violation.is_none_or(|Violation(code)| matches!(code, 1002 | 1003 | 1007 | 1009)));
}
