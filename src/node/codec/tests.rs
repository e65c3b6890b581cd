use super::*;
use proptest::prelude::*;
use tokio_tungstenite::tungstenite::protocol::frame::{Frame, FrameHeader, coding};

/// An event that outlives its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Text(String),
    Ping(Vec<u8>),
    Pong,
    Close(Option<u16>),
    Violation(u16),
}

/// What a decoder makes of `bytes`, cut at `cuts`.
fn decode(bytes: &[u8], cuts: &[usize]) -> Vec<Seen> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.push(bytes.len());
    cuts.sort_unstable();
    let mut decoder = Decoder::default();
    let mut seen = Vec::new();
    let mut from = 0;
    for cut in cuts {
        let mut piece = bytes[from..cut].to_vec();
        from = cut;
        let result = decoder.feed(&mut piece, |event| {
            seen.push(match event {
                Event::Text(text) => Seen::Text(text.to_owned()),
                Event::Ping(payload) => Seen::Ping(payload.to_vec()),
                Event::Pong => Seen::Pong,
                Event::Close(code) => Seen::Close(code),
            });
            Flow::Continue(())
        });
        if let Err(Violation(code)) = result {
            seen.push(Seen::Violation(code));
            break;
        }
        assert!(decoder.rest.len() <= MAX_CLIENT_MESSAGE + 14);
    }
    seen
}

/// A client's frame, masked.
fn client(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [1u8, 2, 3, 4];
    let mut bytes = frame(0, payload);
    bytes[0] = first;
    bytes[1] |= 0x80;
    let header = bytes.len() - payload.len();
    let mut masked = bytes[..header].to_vec();
    masked.extend(mask);
    masked.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    masked
}

fn valid_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "[a-zé]{0,200}".prop_map(|text| client(0x81, text.as_bytes())),
        proptest::collection::vec(any::<u8>(), 0..=125).prop_map(|payload| client(0x89, &payload)),
        proptest::collection::vec(any::<u8>(), 0..=125).prop_map(|payload| client(0x8a, &payload)),
        // A message in three fragments with a ping in between.
        "[a-zé]{3,200}".prop_map(|text| {
            let bytes = text.as_bytes();
            let (a, b) = (bytes.len() / 3, bytes.len() / 2);
            [client(0x01, &bytes[..a]), client(0x89, b"x"), client(0x00, &bytes[a..b]), client(0x80, &bytes[b..])]
                .concat()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn where_the_bytes_are_cut_makes_no_difference(
        frames in proptest::collection::vec(valid_frame(), 0..6),
        garbage in proptest::collection::vec(any::<u8>(), 0..40),
        cuts in proptest::collection::vec(any::<usize>(), 0..20),
    ) {
        let bytes = [frames.concat(), garbage].concat();
        prop_assert_eq!(decode(&bytes, &cuts), decode(&bytes, &[]));
        let every: Vec<usize> = (0..bytes.len()).collect();
        prop_assert_eq!(decode(&bytes, &every), decode(&bytes, &[]));
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        decode(&bytes, &[]);
    }

    #[test]
    fn our_frames_are_those_of_another_implementation(text in "[a-zé]{0,300}", long in 0usize..70_000) {
        for payload in [text, "x".repeat(long)] {
            let mut theirs = Vec::new();
            Frame::message(payload.clone(), coding::OpCode::Data(coding::Data::Text), true).format(&mut theirs).unwrap();
            prop_assert_eq!(super::text(&payload), theirs);
        }
    }

    #[test]
    fn another_implementations_frames_are_read(text in "[a-zé]{0,300}") {
        let header = FrameHeader { mask: Some([9, 8, 7, 6]), opcode: coding::OpCode::Data(coding::Data::Text), ..FrameHeader::default() };
        let mut bytes = Vec::new();
        Frame::from_payload(header, text.clone().into_bytes().into()).format(&mut bytes).unwrap();
        prop_assert_eq!(decode(&bytes, &[]), vec![Seen::Text(text)]);
    }
}

#[test]
fn fragments_with_a_ping_between_make_one_message() {
    let bytes =
        [client(0x01, b"he"), client(0x89, b"p"), client(0x00, b"ll"), client(0x80, b"o"), client(0x81, b"!")].concat();
    let text = |text: &str| Seen::Text(text.into());
    assert_eq!(decode(&bytes, &[]), [Seen::Ping(b"p".to_vec()), text("hello"), text("!")]);
}

#[test]
fn every_violation_has_its_code() {
    let big = "x".repeat(MAX_CLIENT_MESSAGE);
    assert_eq!(decode(&client(0x81, big.as_bytes()), &[]), [Seen::Text(big.clone())]);
    for (bytes, code) in [
        (text("unmasked"), close::PROTOCOL),
        (client(0xc1, b"reserved bit"), close::PROTOCOL),
        (client(0x83, b"reserved opcode"), close::PROTOCOL),
        (client(0x09, b"fragmented ping"), close::PROTOCOL),
        (client(0x89, &[b'x'; 126]), close::PROTOCOL),
        (client(0x80, b"continues nothing"), close::PROTOCOL),
        ([client(0x01, b"a"), client(0x81, b"within a message")].concat(), close::PROTOCOL),
        (client(0x88, b"x"), close::PROTOCOL),
        (client(0x88, &1005u16.to_be_bytes()), close::PROTOCOL),
        (client(0x82, b"binary"), close::NOT_TEXT),
        (client(0x81, b"\xff"), close::NOT_UTF8),
        (client(0x88, b"\x03\xe8\xff"), close::NOT_UTF8),
        ([client(0x01, b"\xc3"), client(0x80, b"\x28")].concat(), close::NOT_UTF8),
        (client(0x81, format!("{big}x").as_bytes()), close::TOO_LONG),
        (client(0x81, &[b'x'; 70_000])[..2].to_vec(), close::TOO_LONG),
        ([client(0x01, big.as_bytes()), client(0x80, b"x")].concat(), close::TOO_LONG),
    ] {
        assert_eq!(decode(&bytes, &[]).last(), Some(&Seen::Violation(code)), "{:02x?}", &bytes[..bytes.len().min(8)]);
    }
}

#[test]
fn a_close_tells_its_code() {
    assert_eq!(decode(&client(0x88, b""), &[]), [Seen::Close(None)]);
    assert_eq!(decode(&client(0x88, b"\x03\xe8bye"), &[]), [Seen::Close(Some(close::NORMAL))]);
    assert_eq!(super::close(1012, &"é".repeat(100)).len(), 2 + 2 + 122);
}

#[test]
fn nothing_is_kept_between_messages() {
    let mut decoder = Decoder::default();
    let mut bytes = client(0x81, b"whole");
    decoder.feed(&mut bytes, |_| Flow::Continue(())).unwrap();
    assert!(decoder.is_idle() && decoder.rest.capacity() == 0);
    let mut bytes = client(0x01, b"part");
    decoder.feed(&mut bytes[..3], |_| Flow::Continue(())).unwrap();
    assert!(!decoder.is_idle());
}
