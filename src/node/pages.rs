//! Bytes that many sockets are sent. On Linux many of them are a file in memory: a socket then refers to its pages instead of
//! copying them, so that neither a login nor a device that reads slowly costs a copy. No clock; no descriptor but that file's.

use std::borrow::Cow;
use std::io::{self, IoSlice, Write};

#[cfg(target_os = "linux")]
use self::file::File;

/// Fewer bytes are copied sooner than referred to: see ARCHITECTURE.md.
const LEAST_BYTES: usize = 64 * 1024;

/// So many files in memory, in all; beyond it bytes are copied. Each takes a descriptor that is not for devices.
pub const MOST_FILES: usize = 128;

/// Bytes that do not change.
#[derive(Debug)]
pub struct Pages(Store);

#[derive(Debug)]
enum Store {
    Bytes(Vec<u8>),
    #[cfg(target_os = "linux")]
    File(File),
}

/// Some of them, adjacent.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    pages: &'a Pages,
    start: usize,
    len: usize,
}

/// A stream that what is retained is written to.
pub trait WriteSpan: Write {
    /// Writes `before`, which may be nothing, and then the span: as much as it takes now. Returns how many bytes of both together;
    /// of a file, fewer than there are do not mean that it would take no more.
    ///
    /// # Errors
    /// Those of [`Write::write_vectored`]; none after some bytes were taken: the next call has it, if it lasts.
    fn write_span(&mut self, before: [&[u8]; 2], span: Span<'_>) -> io::Result<usize> {
        write_copy(self, before, span)
    }
}

fn write_copy<S: Write + ?Sized>(stream: &mut S, before: [&[u8]; 2], span: Span<'_>) -> io::Result<usize> {
    let bytes = span.bytes()?;
    if before.iter().all(|before| before.is_empty()) {
        stream.write(&bytes)
    } else {
        stream.write_vectored(&[before[0], before[1], &bytes].map(IoSlice::new))
    }
}

impl Pages {
    /// Of these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        #[cfg(target_os = "linux")]
        if bytes.len() >= LEAST_BYTES
            && let Some(file) = File::of(&bytes)
        {
            return Self(Store::File(file));
        }
        Self(Store::Bytes(bytes))
    }

    /// Whether so many of them are sent sooner one slice after the other, as what is referred to costs more to begin with.
    #[must_use]
    pub fn is_dear(&self, len: usize) -> bool {
        len < LEAST_BYTES && self.is_file()
    }

    const fn is_file(&self) -> bool {
        !matches!(self.0, Store::Bytes(_))
    }

    /// The bytes from `start` to `end`, if there are so many.
    #[must_use]
    pub fn span(&self, start: usize, end: usize) -> Option<Span<'_>> {
        let len = match &self.0 {
            Store::Bytes(bytes) => bytes.len(),
            #[cfg(target_os = "linux")]
            Store::File(file) => file.len(),
        };
        (start <= end && end <= len).then(|| Span { pages: self, start, len: end - start })
    }
}

impl<'a> Span<'a> {
    /// How many bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether a socket that has room may take only a part of it.
    #[must_use]
    pub const fn is_file(&self) -> bool {
        self.pages.is_file()
    }

    /// The bytes.
    ///
    /// # Errors
    /// The system does not give them.
    pub fn bytes(&self) -> io::Result<Cow<'a, [u8]>> {
        match &self.pages.0 {
            Store::Bytes(bytes) => {
                let bytes = bytes.get(self.start..self.start + self.len);
                bytes.map(Cow::Borrowed).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            #[cfg(target_os = "linux")]
            Store::File(file) => file.read(self.start, self.len).map(Cow::Owned),
        }
    }
}

#[cfg(target_os = "linux")]
mod file {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use mio::net::TcpStream;
    use rustix::fs::{MemfdFlags, SealFlags};
    use rustix::io::Errno;
    use rustix::net::SendFlags;

    use super::{MOST_FILES, Span, Store, WriteSpan, write_copy};

    static FILES: AtomicUsize = AtomicUsize::new(0);

    /// The system does not send files to sockets.
    static REFUSED: AtomicBool = AtomicBool::new(false);

    /// A file in memory that nobody can change any more: sockets refer to its pages long after they were sent.
    #[derive(Debug)]
    pub struct File {
        file: OwnedFd,
        len: usize,
        _place: Place,
    }

    /// One of the [`MOST_FILES`].
    #[derive(Debug)]
    struct Place;

    impl Place {
        fn take() -> Option<Self> {
            let one_more = |files| (files < MOST_FILES).then_some(files + 1);
            FILES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok().map(|_| Self)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            FILES.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl File {
        /// `None` where the system has none for us, or there are too many.
        pub fn of(bytes: &[u8]) -> Option<Self> {
            if REFUSED.load(Ordering::Relaxed) {
                return None;
            }
            let place = Place::take()?;
            let create = |flags| rustix::fs::memfd_create("broadcastd-retained", MemfdFlags::CLOEXEC | flags);
            // Linux before 6.3 does not know the first, which later ones want to be told.
            let file = create(MemfdFlags::NOEXEC_SEAL).or_else(|_| create(MemfdFlags::ALLOW_SEALING)).ok()?;
            let mut written = 0;
            while written < bytes.len() {
                match rustix::io::write(&file, &bytes[written..]) {
                    Ok(0) => return None,
                    Ok(count) => written += count,
                    Err(Errno::INTR) => {}
                    Err(_) => return None,
                }
            }
            let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&file, seals).ok()?;
            Some(Self { file, len: bytes.len(), _place: place })
        }

        pub const fn len(&self) -> usize {
            self.len
        }

        #[cfg(test)]
        pub fn is_sealed(&self) -> bool {
            rustix::io::pwrite(&self.file, b"x", 0) == Err(Errno::PERM)
        }

        /// A copy of some of it.
        pub fn read(&self, start: usize, len: usize) -> io::Result<Vec<u8>> {
            let mut bytes = vec![0; len];
            let mut read = 0;
            while read < len {
                match rustix::io::pread(&self.file, &mut bytes[read..], (start + read) as u64) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => read += count,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(bytes)
        }
    }

    impl WriteSpan for TcpStream {
        fn write_span(&mut self, before: [&[u8]; 2], span: Span<'_>) -> io::Result<usize> {
            let Store::File(file) = &span.pages.0 else { return write_copy(self, before, span) };
            let mut sent = 0;
            // What is told of an error once bytes were taken waits for the next call.
            let or_sent = |sent: usize, error: io::Error| if sent > 0 { Ok(sent) } else { Err(error) };
            for bytes in before.into_iter().filter(|bytes| !bytes.is_empty()) {
                // In one packet with what follows.
                match rustix::net::send(&*self, bytes, SendFlags::MORE | SendFlags::NOSIGNAL) {
                    Ok(count) if count < bytes.len() => return Ok(sent + count),
                    Ok(count) => sent += count,
                    Err(error) => return or_sent(sent, error.into()),
                }
            }
            let mut offset = span.start as u64;
            match rustix::fs::sendfile(&*self, &file.file, Some(&mut offset), span.len) {
                Ok(count) => Ok(sent + count),
                // A sandbox may not know this call: from now on bytes are kept for copying.
                Err(Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => {
                    if !REFUSED.swap(true, Ordering::Relaxed) {
                        tracing::warn!("the system does not send files to sockets; what is retained is copied");
                    }
                    match write_copy(self, [&[]; 2], span) {
                        Ok(count) => Ok(sent + count),
                        Err(error) => or_sent(sent, error),
                    }
                }
                Err(error) => or_sent(sent, error.into()),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl WriteSpan for mio::net::TcpStream {}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|index| (index * 7 + index / 251) as u8).collect()
    }

    #[test]
    fn a_span_has_its_bytes_wherever_they_are() {
        for len in [0, 1, 1000, 64 * 1024, 100_000] {
            let expected = bytes(len);
            let pages = Pages::new(expected.clone());
            for (start, end) in [(0, len), (len / 3, len / 2), (len, len)] {
                let span = pages.span(start, end).unwrap();
                assert_eq!((&*span.bytes().unwrap(), span.len()), (&expected[start..end], end - start));
            }
            assert!(pages.span(0, len + 1).is_none());
        }
    }

    /// A socket's two ends; the first takes little at a time.
    fn socket() -> (mio::net::TcpStream, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ours = listener.accept().unwrap().0;
        ours.set_nonblocking(true).unwrap();
        socket2::SockRef::from(&ours).set_send_buffer_size(8192).unwrap();
        (mio::net::TcpStream::from_std(ours), theirs)
    }

    #[test]
    fn a_socket_is_given_what_comes_before_and_the_span_in_as_many_parts_as_it_takes() {
        let long = bytes(300_000);
        let beginnings: [[&[u8]; 2]; 3] = [[b"first", b"second"], [b"", b"second"], [&long, &long[7..]]];
        for (len, before) in [1000, 200_000].into_iter().flat_map(|len| beginnings.map(|before| (len, before))) {
            let (mut ours, mut theirs) = socket();
            let all = bytes(len);
            let pages = Pages::new(all.clone());
            let expected: Vec<u8> = before.concat().into_iter().chain(all[10..].iter().copied()).collect();
            let (mut sent, mut received, mut refusals) = (0, Vec::new(), 0);
            let mut buffer = vec![0; 50_000];
            while received.len() < expected.len() {
                let waiting = before.map(|bytes| bytes.len());
                let left =
                    [&before[0][sent.min(waiting[0])..], &before[1][sent.saturating_sub(waiting[0]).min(waiting[1])..]];
                let at = 10 + sent.saturating_sub(waiting[0] + waiting[1]);
                let span = pages.span(at, len).unwrap();
                match ours.write_span(left, span) {
                    Ok(count) => sent += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => refusals += 1,
                    Err(error) => panic!("{error}"),
                }
                if sent > received.len() {
                    let count = theirs.read(&mut buffer).unwrap();
                    received.extend_from_slice(&buffer[..count]);
                }
                if sent == expected.len() {
                    drop(ours);
                    theirs.read_to_end(&mut received).unwrap();
                    break;
                }
            }
            assert!(received == expected, "{len}: {sent} sent, {refusals} times full");
        }
    }

    #[test]
    fn a_connection_that_is_gone_is_an_error() {
        let (mut ours, theirs) = socket();
        socket2::SockRef::from(&theirs).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(theirs);
        let pages = Pages::new(bytes(200_000));
        let span = pages.span(0, 200_000).unwrap();
        // What was taken before the reset arrived is no error.
        let error = std::iter::repeat_with(|| ours.write_span([b"before", b""], span)).find_map(Result::err);
        assert_ne!(error.map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn many_bytes_are_a_file_that_nobody_can_change_and_there_are_not_too_many_of_them() {
        assert!(!Pages::new(bytes(LEAST_BYTES - 1)).is_file());
        let Pages(Store::File(file)) = Pages::new(bytes(LEAST_BYTES)) else { panic!("copied") };
        assert!(file.is_sealed());
        drop(file);
        let many: Vec<Pages> = (0..MOST_FILES + 1).map(|_| Pages::new(bytes(LEAST_BYTES))).collect();
        let files = many.iter().filter(|pages| pages.is_file()).count();
        // Other tests have some.
        assert!(files <= MOST_FILES && files > MOST_FILES / 2, "{files}");
        assert!(many.iter().all(|pages| *pages.span(0, LEAST_BYTES).unwrap().bytes().unwrap() == bytes(LEAST_BYTES)));
        drop(many);
        assert!(Pages::new(bytes(LEAST_BYTES)).is_file(), "their places are free again");
    }
}
