//! The WebSocket protocol's frames (RFC 6455), server side, as pure functions of bytes.
//!
//! Written here because no crate offers a frame that is encoded once and shared by all connections, and because an idle
//! connection must cost no buffer.

/// The longest message that a device may send, in bytes: a login with its token fits easily.
pub const MAX_CLIENT_MESSAGE: usize = 4096;

/// The longest payload of a control frame, in bytes.
const MAX_CONTROL: usize = 125;

/// A ping without content, finished.
pub const PING: [u8; 2] = [0x80 | opcode::PING, 0];

mod opcode {
    pub const CONTINUATION: u8 = 0;
    pub const TEXT: u8 = 1;
    pub const BINARY: u8 = 2;
    pub const CLOSE: u8 = 8;
    pub const PING: u8 = 9;
    pub const PONG: u8 = 10;
}

/// Close codes that the node sends.
pub mod close {
    /// Done.
    pub const NORMAL: u16 = 1000;
    /// The frames break the protocol.
    pub const PROTOCOL: u16 = 1002;
    /// Not a text message.
    pub const NOT_TEXT: u16 = 1003;
    /// Text that is not UTF-8.
    pub const NOT_UTF8: u16 = 1007;
    /// No valid login.
    pub const POLICY: u16 = 1008;
    /// A message over [`super::MAX_CLIENT_MESSAGE`].
    pub const TOO_LONG: u16 = 1009;
    /// The node is going away; connect again.
    pub const RESTART: u16 = 1012;
    /// Too far behind; connect again with the cursor.
    pub const TRY_AGAIN: u16 = 1013;
}

/// What a client did wrong; the connection is closed with this code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation(pub u16);

impl Violation {
    /// For the device.
    #[must_use]
    pub const fn desc(self) -> &'static str {
        match self.0 {
            close::NOT_TEXT => "a device sends text messages only",
            close::NOT_UTF8 => "text is UTF-8",
            close::TOO_LONG => "a message has at most 4096 bytes",
            _ => "the frames are not those of RFC 6455",
        }
    }
}

/// What a client sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole text message.
    Text(&'a str),
    /// A ping, to be answered with a pong of the same content.
    Ping(&'a [u8]),
    /// A pong.
    Pong,
    /// The client closes; the code it gave, if any.
    Close(Option<u16>),
}

/// Whether the reader wants more events.
pub type Flow = std::ops::ControlFlow<()>;

/// Reads a client's frames, wherever the bytes are cut. Holds memory only within a frame or a fragmented message, at most
/// twice [`MAX_CLIENT_MESSAGE`].
#[derive(Debug, Default)]
pub struct Decoder {
    /// The bytes of a frame that is not complete.
    rest: Vec<u8>,
    /// The fragments so far of a message that is not complete.
    message: Option<Vec<u8>>,
}

struct Header {
    fin: bool,
    opcode: u8,
    mask: [u8; 4],
    /// Bytes of the header itself.
    size: usize,
    /// Bytes of the payload.
    length: usize,
}

impl Decoder {
    /// Whether nothing is half read, so that the decoder can be thrown away.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.rest.is_empty() && self.message.is_none()
    }

    /// Takes the next bytes (unmasking them in place) and gives each event to `handle`, until that breaks off.
    ///
    /// # Errors
    /// What the client did wrong; no event comes after it.
    pub fn feed(&mut self, bytes: &mut [u8], mut handle: impl FnMut(Event<'_>) -> Flow) -> Result<(), Violation> {
        if self.rest.is_empty() {
            let used = self.read(bytes, &mut handle)?;
            self.rest.extend_from_slice(bytes.get(used..).unwrap_or_default());
        } else {
            let mut rest = std::mem::take(&mut self.rest);
            rest.extend_from_slice(bytes);
            let used = self.read(&mut rest, &mut handle)?;
            if used < rest.len() {
                rest.drain(..used);
                self.rest = rest;
            }
        }
        Ok(())
    }

    /// Reads all complete frames; returns how many bytes they were.
    fn read(&mut self, bytes: &mut [u8], handle: &mut impl FnMut(Event<'_>) -> Flow) -> Result<usize, Violation> {
        let mut used = 0;
        while let Some(header) = self.header(&bytes[used..])? {
            let Some(payload) = bytes.get_mut(used + header.size..used + header.size + header.length) else { break };
            used += header.size + header.length;
            payload.iter_mut().zip(header.mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
            if self.frame(&header, payload, handle)?.is_break() {
                // What follows is of no interest any more.
                return Ok(bytes.len());
            }
        }
        Ok(used)
    }

    /// Reads a header, `None` if it is not complete. Everything wrong is noticed at its byte, so that the answer does not
    /// depend on where the bytes are cut.
    fn header(&self, bytes: &[u8]) -> Result<Option<Header>, Violation> {
        let Some(&first) = bytes.first() else { return Ok(None) };
        let (fin, reserved, opcode) = (first & 0x80 != 0, first & 0x70, first & 0x0f);
        let fits = match opcode {
            opcode::TEXT | opcode::BINARY => self.message.is_none(),
            opcode::CONTINUATION => self.message.is_some(),
            opcode::CLOSE | opcode::PING | opcode::PONG => fin,
            _ => false,
        };
        if reserved != 0 || !fits {
            return Err(Violation(close::PROTOCOL));
        }
        if opcode == opcode::BINARY {
            return Err(Violation(close::NOT_TEXT));
        }
        let Some(&second) = bytes.get(1) else { return Ok(None) };
        if second & 0x80 == 0 {
            return Err(Violation(close::PROTOCOL));
        }
        let is_control = opcode >= opcode::CLOSE;
        let (length, length_size) = match second & 0x7f {
            _ if is_control && usize::from(second & 0x7f) > MAX_CONTROL => return Err(Violation(close::PROTOCOL)),
            // A 64-bit length is over the limit, whatever it says.
            127 => return Err(Violation(close::TOO_LONG)),
            126 => match bytes.get(2..4) {
                Some(&[high, low]) => (usize::from(u16::from_be_bytes([high, low])), 2),
                _ => return Ok(None),
            },
            short => (usize::from(short), 0),
        };
        let before = self.message.as_ref().map_or(0, Vec::len);
        if !is_control && before + length > MAX_CLIENT_MESSAGE {
            return Err(Violation(close::TOO_LONG));
        }
        let size = 2 + length_size + 4;
        let Some(Ok(mask)) = bytes.get(size - 4..size).map(<[u8; 4]>::try_from) else { return Ok(None) };
        Ok(Some(Header { fin, opcode, mask, size, length }))
    }

    fn frame(
        &mut self,
        header: &Header,
        payload: &[u8],
        handle: &mut impl FnMut(Event<'_>) -> Flow,
    ) -> Result<Flow, Violation> {
        let event = match (header.opcode, header.fin) {
            (opcode::PING, _) => Event::Ping(payload),
            (opcode::PONG, _) => Event::Pong,
            (opcode::CLOSE, _) => Event::Close(close_code(payload)?),
            (opcode::TEXT, true) => Event::Text(utf8(payload)?),
            (_, false) => {
                self.message.get_or_insert_default().extend_from_slice(payload);
                return Ok(Flow::Continue(()));
            }
            (_, true) => {
                let mut message = self.message.take().unwrap_or_default();
                message.extend_from_slice(payload);
                return Ok(handle(Event::Text(utf8(&message)?)));
            }
        };
        Ok(handle(event))
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, Violation> {
    simdutf8::basic::from_utf8(bytes).map_err(|_| Violation(close::NOT_UTF8))
}

fn close_code(payload: &[u8]) -> Result<Option<u16>, Violation> {
    match payload {
        [] => Ok(None),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                return Err(Violation(close::PROTOCOL));
            }
            utf8(reason)?;
            Ok(Some(code))
        }
        [_] => Err(Violation(close::PROTOCOL)),
    }
}

#[allow(clippy::cast_possible_truncation)] // each within the range that is matched
fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 10);
    frame.push(0x80 | opcode);
    match payload.len() {
        length @ 0..=125 => frame.push(length as u8),
        length @ 126..=0xffff => {
            frame.push(126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

/// A text message in one frame.
#[must_use]
pub fn text(payload: &str) -> Vec<u8> {
    frame(opcode::TEXT, payload.as_bytes())
}

/// The answer to a ping. `payload`: the ping's, at most 125 bytes.
#[must_use]
pub fn pong(payload: &[u8]) -> Vec<u8> {
    frame(opcode::PONG, &payload[..payload.len().min(MAX_CONTROL)])
}

/// A close frame. `reason`: cut to 123 bytes.
#[must_use]
pub fn close(code: u16, reason: &str) -> Vec<u8> {
    let mut payload = code.to_be_bytes().to_vec();
    let mut end = reason.len().min(MAX_CONTROL - 2);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    frame(opcode::CLOSE, &payload)
}

#[cfg(test)]
mod tests;
