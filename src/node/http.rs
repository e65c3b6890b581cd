//! The HTTP request that begins a connection: the WebSocket upgrade, or something else. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// The longest request head, in bytes.
pub const MAX_HEAD: usize = 8192;

/// The path that devices connect to.
const PATH: &str = "/ws";

/// What the bytes so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Head {
    /// The beginning of a head.
    Partial,
    /// A WebSocket upgrade.
    Upgrade {
        /// The finished answer.
        answer: String,
        /// Bytes of the head; what follows are frames.
        size: usize,
    },
    /// Another request, well-formed.
    Other,
    /// Not acceptable.
    Refused(Refusal),
}

/// The answers other than the upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Unreadable, or not as RFC 6455 wants it.
    BadRequest,
    /// Not from an allowed origin.
    Forbidden,
    /// Nothing else is served here.
    NotFound,
    /// `/ws` is for WebSockets, version 13.
    UpgradeRequired,
    /// A head over [`MAX_HEAD`].
    TooLarge,
    /// No room for another connection.
    Busy,
    /// No room for another connection from this address.
    TooMany,
}

impl Refusal {
    /// The finished answer, after which the connection is closed.
    #[must_use]
    pub const fn answer(self) -> &'static str {
        match self {
            Self::BadRequest => "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            Self::Forbidden => "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            Self::NotFound => "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
            Self::UpgradeRequired => {
                "HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Connection: Upgrade, close\r\nContent-Length: 0\r\n\r\n"
            }
            Self::TooLarge => {
                "HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            }
            Self::Busy => {
                "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            }
            Self::TooMany => {
                "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 10\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            }
        }
    }

    /// The label of the metric.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Forbidden => "origin",
            Self::NotFound => "not_found",
            Self::UpgradeRequired => "no_upgrade",
            Self::TooLarge => "head_too_large",
            Self::Busy => "busy",
            Self::TooMany => "address_full",
        }
    }
}

/// Reads the head. `allowed_origins`: empty for any; a request without an `Origin` does not come from a browser.
#[must_use]
pub fn read_head(bytes: &[u8], allowed_origins: &[String]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    let size = match request.parse(bytes) {
        Ok(httparse::Status::Complete(size)) if size <= MAX_HEAD => size,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Head::Partial,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Head::Refused(Refusal::TooLarge),
        Err(_) => return Head::Refused(Refusal::BadRequest),
    };
    let path = request.path.unwrap_or_default();
    if path.split('?').next() != Some(PATH) {
        return Head::Other;
    }
    let header = |name: &str| {
        let mut values = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        values.next().and_then(|header| std::str::from_utf8(header.value).ok()).map(str::trim)
    };
    let lists = |name: &str, wanted: &str| {
        let mut values = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        values.any(|header| {
            header.value.split(|b| *b == b',').any(|v| v.trim_ascii().eq_ignore_ascii_case(wanted.as_bytes()))
        })
    };
    if request.method != Some("GET")
        || request.version != Some(1)
        || !lists("upgrade", "websocket")
        || !lists("connection", "upgrade")
        || header("sec-websocket-version") != Some("13")
    {
        return Head::Refused(Refusal::UpgradeRequired);
    }
    // Each of them, readable or not: nobody has two, and the first need not be the one that counts.
    let mut origins = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("origin"));
    let is_allowed = |origin: &[u8]| {
        allowed_origins.iter().any(|allowed| allowed.as_bytes().eq_ignore_ascii_case(origin.trim_ascii()))
    };
    if !allowed_origins.is_empty() && !origins.all(|header| is_allowed(header.value)) {
        return Head::Refused(Refusal::Forbidden);
    }
    let count = |name: &str| request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name)).count();
    let is_ambiguous = ["host", "sec-websocket-key", "sec-websocket-version"].into_iter().any(|name| count(name) != 1);
    // What follows the head are frames: a body would be taken for them.
    let has_body = request.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || header.name.eq_ignore_ascii_case("content-length") && header.value.trim_ascii() != b"0"
    });
    if is_ambiguous || has_body {
        return Head::Refused(Refusal::BadRequest);
    }
    let Some(key) = header("sec-websocket-key") else { return Head::Refused(Refusal::BadRequest) };
    if STANDARD.decode(key).map_or(0, |nonce| nonce.len()) != 16 {
        return Head::Refused(Refusal::BadRequest);
    }
    Head::Upgrade { answer: answer(key), size }
}

fn answer(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.as_bytes());
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = STANDARD.encode(hash.finalize());
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nOrigin: https://a.example\r\n\r\n";

    fn read(text: &str) -> Head {
        read_head(text.as_bytes(), &[])
    }

    #[test]
    fn the_example_of_the_rfc_is_answered() {
        let Head::Upgrade { answer, size } = read(&format!("{GOOD}frames")) else { panic!("an upgrade") };
        assert!(answer.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"));
        assert_eq!(size, GOOD.len());
        assert!(matches!(read(&GOOD.replace("/ws", "/ws?v=1")), Head::Upgrade { .. }));
    }

    #[test]
    fn every_beginning_is_partial() {
        for end in 0..GOOD.len() {
            assert_eq!(read(&GOOD[..end]), Head::Partial, "{end}");
        }
    }

    #[test]
    fn everything_else_has_its_answer() {
        let refused = |text: &str| match read(text) {
            Head::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        };
        assert_eq!(read("GET / HTTP/1.1\r\n\r\n"), Head::Other);
        assert_eq!(read("POST /nimserver/x HTTP/1.1\r\n\r\na=b"), Head::Other);
        assert_eq!(refused("GET /ws HTTP/1.1\r\n\r\n"), Refusal::UpgradeRequired);
        assert_eq!(refused(&GOOD.replace("Version: 13", "Version: 8")), Refusal::UpgradeRequired);
        assert_eq!(refused(&GOOD.replace("GET", "POST")), Refusal::UpgradeRequired);
        assert_eq!(refused(&GOOD.replace("dGhlIHNhbXBsZSBub25jZQ==", "short")), Refusal::BadRequest);
        assert_eq!(refused(&GOOD.replace("Host: x\r\n", "")), Refusal::BadRequest);
        for header in ["Host: y", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"] {
            assert_eq!(refused(&GOOD.replace("Host: x", &format!("Host: x\r\n{header}"))), Refusal::BadRequest);
        }
        assert_eq!(refused(&GOOD.replace("Host: x", "Host: x\r\nContent-Length: 3")), Refusal::BadRequest);
        assert_eq!(refused(&GOOD.replace("Host: x", "Host: x\r\nTransfer-Encoding: chunked")), Refusal::BadRequest);
        assert!(matches!(read(&GOOD.replace("Host: x", "Host: x\r\nContent-Length: 0")), Head::Upgrade { .. }));
        assert_eq!(refused("\u{1}\u{2}\r\n\r\n"), Refusal::BadRequest);
        assert_eq!(refused(&format!("GET /ws HTTP/1.1\r\nX: {}", "x".repeat(MAX_HEAD))), Refusal::TooLarge);
        assert_eq!(refused(&format!("GET /ws HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(65))), Refusal::TooLarge);
    }

    #[test]
    fn only_allowed_origins_and_those_without_one_come_in() {
        let allowed = ["https://a.example".to_owned()];
        assert!(matches!(read_head(GOOD.as_bytes(), &allowed), Head::Upgrade { .. }));
        let other = GOOD.replace("a.example", "b.example");
        assert_eq!(read_head(other.as_bytes(), &allowed), Head::Refused(Refusal::Forbidden));
        for second in ["https://b.example", "\u{ff}", ""] {
            let two = GOOD.replace("Origin:", &format!("Origin: https://a.example\r\nOrigin: {second}\r\nX:"));
            assert_eq!(read_head(two.as_bytes(), &allowed), Head::Refused(Refusal::Forbidden));
        }
        let none = GOOD.replace("Origin: https://a.example\r\n", "");
        assert!(matches!(read_head(none.as_bytes(), &allowed), Head::Upgrade { .. }));
    }
}
