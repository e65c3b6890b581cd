//! The HTTP request that begins a connection, and what follows it.

use broadcastd::fuzzing::{Head, MAX_HEAD, read_head};

const ORIGIN: &str = "https://a.example";

pub fn run(data: &[u8]) {
    let allowed = [ORIGIN.to_owned()];
    for allowed in [&[][..], &allowed] {
        let whole = read_head(data, allowed);
        // A verdict on the beginning stands, whatever comes after it.
        let step = data.len() / 64 + 1;
        for end in (0..data.len()).step_by(step).chain(data.len().checked_sub(1)) {
            let early = read_head(&data[..end], allowed);
            assert!(early == Head::Partial || early == whole, "{early:?} of {end}, then {whole:?}");
        }
        match whole {
            Head::Partial => assert!(data.len() < MAX_HEAD),
            Head::Upgrade { answer, size } => check_upgrade(&data[..size], &answer, allowed),
            Head::Other | Head::Refused(_) => {}
        }
    }
}

/// Looks at the lines of a head that was accepted, by simpler rules of its own.
fn check_upgrade(head: &[u8], answer: &str, allowed: &[String]) {
    assert!(head.len() <= MAX_HEAD && (head.ends_with(b"\n\r\n") || head.ends_with(b"\n\n")));
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.by_ref().find(|line| !line.is_empty()).expect("a request line");
    assert!(first.starts_with(b"GET /ws") && first.ends_with(b"HTTP/1.1"));
    let headers: Vec<(Vec<u8>, &[u8])> = lines
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            Some((line[..colon].to_ascii_lowercase(), line[colon + 1..].trim_ascii()))
        })
        .collect();
    let values = |name: &str| -> Vec<&[u8]> {
        headers.iter().filter(|(header, _)| header == name.as_bytes()).map(|(_, value)| *value).collect()
    };
    assert_eq!(values("host").len(), 1);
    assert_eq!(values("transfer-encoding").len(), 0);
    assert!(values("content-length").iter().all(|value| *value == b"0"));
    assert_eq!(values("sec-websocket-version"), [b"13"], "and not another one beside it");
    assert_eq!(values("sec-websocket-key").len(), 1, "which one would be answered?");
    assert_eq!(values("sec-websocket-key")[0].len(), 24, "16 bytes in base64");
    if !allowed.is_empty() {
        assert!(values("origin").iter().all(|origin| origin.eq_ignore_ascii_case(ORIGIN.as_bytes())));
    }
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with("=\r\n\r\n"));
}
