//! A TCP proxy that misbehaves on demand: between a role and RabbitMQ or Redis it cuts, swallows, delays and slices.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the proxy does with what passes, both ways unless it says otherwise. It applies to open connections at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Passes everything on.
    Fair,
    /// Takes connections and bytes, and passes nothing on: no RST, no FIN. What was taken is passed on when it clears up.
    BlackHole,
    /// The same for some connections, from the first to the last of them by their number in the order of arrival, from 0;
    /// everything else passes.
    BlackHoleOf(usize, usize),
    /// Passes on what clients send; what servers answer is swallowed until it clears up.
    AnswersLost,
    /// Closes every connection with a reset, and each new one too.
    Cut,
    /// Passes everything on after this long.
    Delay(Duration),
    /// Passes on at most this many bytes at a time.
    Slice(usize),
}

/// A listening proxy; dropped, it closes everything.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    _accepting: tokio::task::JoinSet<()>,
}

impl Proxy {
    /// In front of a port of 127.0.0.1.
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, watched) = watch::channel(Weather::Fair);
        let mut accepting = tokio::task::JoinSet::new();
        accepting.spawn(accept(listener, port, watched));
        Self { address, weather, _accepting: accepting }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The same address with the proxy's port in place of the server's.
    pub fn instead_of(&self, url: &str, port: u16) -> String {
        let proxied = url.replace(&format!(":{port}"), &format!(":{}", self.port()));
        assert_ne!(proxied, url, "the address names the port");
        proxied
    }

    /// Changes what it does.
    pub fn weather(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

async fn accept(listener: TcpListener, port: u16, weather: watch::Receiver<Weather>) {
    // Dropped with the proxy, and with it every connection.
    let mut connections = tokio::task::JoinSet::new();
    for number in 0.. {
        let (client, _) = listener.accept().await.unwrap();
        connections.spawn(connection(client, number, port, weather.clone()));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(client: TcpStream, number: usize, port: u16, weather: watch::Receiver<Weather>) {
    let mut changes = weather.clone();
    // With this, dropping a socket resets it.
    let reset_on_drop = |stream: &TcpStream| {
        socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
        stream.set_nodelay(true).unwrap();
    };
    reset_on_drop(&client);
    if *weather.borrow() == Weather::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    reset_on_drop(&server);
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let cut = changes.wait_for(|weather| *weather == Weather::Cut);
    tokio::select! {
        _ = cut => {}
        () = pass(client_in, server_out, Way::ToServer, number, weather.clone()) => {}
        () = pass(server_in, client_out, Way::ToClient, number, weather) => {}
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ToServer,
    ToClient,
}

/// Until one side ends.
async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: Way,
    number: usize,
    mut weather: watch::Receiver<Weather>,
) {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let Ok(count) = from.read(&mut bytes).await else { return };
        if count == 0 {
            return;
        }
        let mut rest = &bytes[..count];
        while !rest.is_empty() {
            let now = *weather.borrow_and_update();
            let piece = match now {
                // Cut: what was held back must not slip through before the connection is gone.
                Weather::BlackHole | Weather::Cut => 0,
                Weather::BlackHoleOf(first, last) if (first..=last).contains(&number) => 0,
                Weather::AnswersLost if way == Way::ToClient => 0,
                Weather::Slice(size) => size.min(rest.len()),
                _ => rest.len(),
            };
            if let Weather::Delay(delay) = now {
                tokio::time::sleep(delay).await;
            }
            if piece == 0 {
                if weather.changed().await.is_err() {
                    return;
                }
                continue;
            }
            if to.write_all(&rest[..piece]).await.is_err() {
                return;
            }
            rest = &rest[piece..];
        }
    }
}
