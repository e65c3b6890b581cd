//! The floor: the least that any server does. It accepts, answers the upgrade, and for each line `COUNT` on its standard input
//! sends one ready-made frame to every socket, `COUNT` times over: a bare loop of `send`; it prints how long that took, nanoseconds. For `0` it
//! prints the CPU that the greetings of those who came since the last time took, in its thread. One thread, run as a process of its own.

use std::io::{BufRead, Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};

const LISTENER: Token = Token(usize::MAX - 1);
const STDIN: Token = Token(usize::MAX);

/// A text frame of so many bytes of payload.
fn frame(payload: usize) -> Vec<u8> {
    let mut frame = vec![0x81, 126];
    frame.extend(u16::try_from(payload).unwrap().to_be_bytes());
    frame.extend(vec![b'x'; payload]);
    frame
}

/// The CPU that this thread has used.
fn thread_cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(used.tv_sec).unwrap(), u32::try_from(used.tv_nsec).unwrap())
}

/// `port, bytes of a frame's payload, frames to send at once to each who has logged in, bytes of those`
pub fn run(arguments: &[String]) {
    let number = |index: usize| -> usize { arguments[index].parse().unwrap() };
    let (port, payload, greeting, greeting_payload) = (number(0), number(1), number(2), number(3));
    let listener = TcpListener::bind(("127.0.0.1", u16::try_from(port).unwrap())).unwrap();
    // The same queue of connections as a real server's.
    socket2::SockRef::from(&listener).listen(4096).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut listener = mio::net::TcpListener::from_std(listener);
    let mut poll = Poll::new().unwrap();
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE).unwrap();
    let waker = Waker::new(poll.registry(), STDIN).unwrap();
    let (sender, counts) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            sender.send(line.trim().parse::<usize>().unwrap()).unwrap();
            waker.wake().unwrap();
        }
        std::process::exit(0);
    });
    let frame = frame(payload);
    let greeting = self::frame(greeting_payload).repeat(greeting);
    let mut sockets: Vec<Option<(TcpStream, bool, usize)>> = Vec::new();
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    let mut greeting_took = Duration::ZERO;
    loop {
        poll.poll(&mut events, None).unwrap();
        for event in &events {
            match event.token() {
                LISTENER => {
                    while let Ok((mut socket, _)) = listener.accept() {
                        socket.set_nodelay(true).unwrap();
                        let interest = Interest::READABLE | Interest::WRITABLE;
                        poll.registry().register(&mut socket, Token(sockets.len()), interest).unwrap();
                        sockets.push(Some((socket, false, 0)));
                    }
                }
                STDIN => {}
                Token(index) => {
                    let Some((socket, greeted, left)) = &mut sockets[index] else { continue };
                    if event.is_readable() {
                        match socket.read(&mut buffer) {
                            Ok(0) | Err(_) => {
                                sockets[index] = None;
                                continue;
                            }
                            Ok(_) if !*greeted => {
                                *greeted = true;
                                let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                                    Connection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
                                socket.write_all(answer.as_bytes()).unwrap();
                                *left = greeting.len();
                            }
                            Ok(_) => {}
                        }
                    }
                    let start = (*left > 0).then(thread_cpu);
                    while *left > 0
                        && let Ok(sent) = socket.write(&greeting[greeting.len() - *left..])
                    {
                        let is_full = sent < *left;
                        *left -= sent;
                        if is_full {
                            // It would take no more now.
                            break;
                        }
                    }
                    greeting_took += start.map_or(Duration::ZERO, |start| thread_cpu() - start);
                }
            }
        }
        while let Ok(count) = counts.try_recv() {
            let start = std::time::Instant::now();
            for _ in 0..count {
                for (socket, ..) in sockets.iter_mut().flatten() {
                    assert_eq!(socket.write(&frame).unwrap(), frame.len(), "a socket is full");
                }
            }
            let took = if count == 0 { std::mem::take(&mut greeting_took) } else { start.elapsed() };
            // Nobody reads it in most cases.
            let _ = writeln!(std::io::stdout(), "{}", took.as_nanos());
        }
    }
}
