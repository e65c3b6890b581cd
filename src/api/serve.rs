//! Serving the routes: on a listener of their own, or on connections that were accepted elsewhere and whose first bytes
//! have been read already (standalone shares one port with the devices).

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at once. On a listener, further ones wait in its backlog; handed-over ones are answered 503.
pub const MAX_CONNECTIONS: usize = 2048;
/// How long the head of a request may take; also how long a connection may be idle between two.
/// Short, so that connections that say nothing cannot hold the places of those that do.
const HEAD: Duration = Duration::from_secs(5);
/// How long an answer may wait for its reader, from the first byte that does not fit the system's buffers to the last one written.
/// As a whole: a client that reads a byte now and then is no better.
const UNREAD: Duration = Duration::from_secs(10);
/// Bytes of requests, and of answers, that are held for a connection: a client that sends on and reads nothing has no more.
const BUFFER: usize = 64 * 1024;
/// Connections that are being answered 503, at once. Further ones are closed without a word.
pub const MAX_REFUSED: usize = 64;
/// How long that may take, and how much of such a request is read and thrown away, so that its client sees the answer.
const REFUSING: Duration = Duration::from_secs(1);
const REFUSED_BYTES: u64 = 128 * 1024;
/// The answer.
const FULL: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n\
    Cache-Control: no-store\r\nContent-Length: 63\r\nConnection: close\r\n\r\n\
    {\"code\":503,\"desc\":\"busy: nothing was sent; try again later\"}\r\n";

/// Serves a listener until `shutdown`; then lets the calls under way finish, and returns when the last one has.
pub async fn serve(listener: TcpListener, router: Router, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = shutdown.cancelled() => break,
        };
        // The semaphore is never closed.
        let Ok(permit) = permit else { break };
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(connection(
                    Prefixed::new(Vec::new(), stream),
                    router.clone(),
                    true,
                    permit,
                    shutdown.clone(),
                ));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                // Out of file descriptors, most likely: trying at once would only spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Serves connections as they come over, each with the bytes that were read from it already; ends like [`serve`].
///
/// One request a connection: a next one on it could be a device's WebSocket upgrade, which is not served here.
pub async fn serve_handed_over(
    mut receiver: mpsc::Receiver<(std::net::TcpStream, Vec<u8>)>,
    router: Router,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let refusals = Arc::new(Semaphore::new(MAX_REFUSED));
    let connections = TaskTracker::new();
    loop {
        let handed_over = tokio::select! {
            handed_over = receiver.recv() => handed_over,
            () = shutdown.cancelled() => break,
        };
        let Some((stream, prefix)) = handed_over else { break };
        let stream = match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection over");
                continue;
            }
        };
        if let Ok(permit) = Arc::clone(&permits).try_acquire_owned() {
            let stream = Prefixed::new(prefix, stream);
            connections.spawn(connection(stream, router.clone(), false, permit, shutdown.clone()));
        } else {
            tracing::warn!(most = MAX_CONNECTIONS, "too many HTTP connections; refused one");
            if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                connections.spawn(refuse(stream, permit));
            }
        }
    }
    connections.close();
    connections.wait().await;
}

/// Answers 503, whatever the request is.
async fn refuse(mut stream: TcpStream, permit: OwnedSemaphorePermit) {
    let _permit = permit;
    let answer = async {
        stream.write_all(FULL.as_bytes()).await?;
        stream.shutdown().await?;
        // A connection that is closed with bytes unread is reset, and the answer may be lost with it.
        tokio::io::copy(&mut stream.take(REFUSED_BYTES), &mut tokio::io::sink()).await
    };
    // An error is a client that went away: no news.
    let _ = tokio::time::timeout(REFUSING, answer).await;
}

/// `keep_alive`: whether further requests may follow the first one.
async fn connection(
    stream: Prefixed<TcpStream>,
    router: Router,
    keep_alive: bool,
    permit: OwnedSemaphorePermit,
    shutdown: CancellationToken,
) {
    let _permit = permit;
    // Answers are small and whole: waiting for more to send would only delay them. An error shows at the first write.
    let _ = stream.inner.set_nodelay(true);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER)
        .keep_alive(keep_alive)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(served);
    // An error is a client that went away or sends something else than HTTP: no news.
    tokio::select! {
        _ = served.as_mut() => return,
        () = shutdown.cancelled() => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

/// A stream whose first bytes have been read already, and whose writes fail when they have waited for too long.
struct Prefixed<S> {
    prefix: Vec<u8>,
    position: usize,
    inner: S,
    /// Runs while something waits to be written.
    unread: Option<Pin<Box<Sleep>>>,
}

impl<S> Prefixed<S> {
    const fn new(prefix: Vec<u8>, inner: S) -> Self {
        Self { prefix, position: 0, inner, unread: None }
    }

    /// What a write is told: its own result, or that it has waited for too long.
    fn bounded<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_pending() {
            let unread = self.unread.get_or_insert_with(|| Box::pin(tokio::time::sleep(UNREAD)));
            if unread.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = self.prefix.get(self.position..).unwrap_or_default();
        if left.is_empty() {
            return Pin::new(&mut self.inner).poll_read(context, buffer);
        }
        let count = left.len().min(buffer.remaining());
        buffer.put_slice(left.get(..count).unwrap_or_default());
        self.position += count;
        if self.position >= self.prefix.len() {
            self.prefix = Vec::new();
            self.position = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bounded(written, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper flushes when it has written all it has.
        let flushed = Pin::new(&mut self.inner).poll_flush(context);
        if flushed.is_ready() {
            self.unread = None;
        }
        self.bounded(flushed, context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.inner).poll_shutdown(context);
        self.bounded(shut, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::time::Instant;

    fn router() -> Router {
        Router::new().route("/hello", get(|| async { "hi" }))
    }

    #[tokio::test]
    async fn a_connection_is_taken_over_with_what_was_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = mpsc::channel(1);
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(serve_handed_over(receiver, router(), shutdown.clone()));
        let mut client = TcpStream::connect(address).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let first = b"GET /hello HT".to_vec();
        sender.send((accepted.into_std().unwrap(), first)).await.unwrap();
        client.write_all(b"TP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hi"), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "the next request may be a device's: {answer}");
        shutdown.cancel();
        server.await.unwrap();
    }

    #[tokio::test]
    async fn when_full_it_says_so_and_has_room_again_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let permits = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
        let refusal = tokio::spawn(refuse(accepted, permit));
        let (mut reader, mut writer) = client.into_split();
        writer.write_all(b"POST /nimserver/x HTTP/1.1\r\nContent-Length: 65536\r\n\r\n").await.unwrap();
        writer.write_all(&[b'x'; 65_536]).await.unwrap();
        drop(writer);
        refusal.await.unwrap();
        let mut answer = String::new();
        reader.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("\r\nConnection: close"), "{head}");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{answer}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["code"], 503);
        assert_eq!(permits.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_closed_in_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(serve(listener, router(), shutdown.clone()));
        for said in ["", "GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let started = Instant::now();
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(said.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            assert!(started.elapsed() < Duration::from_secs(11), "{:?} after {said:?}", started.elapsed());
        }
        shutdown.cancel();
        server.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_asks_on_and_never_reads_is_hung_up_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let page = "x".repeat(64 * 1024);
        let router = Router::new().route("/page", get(move || std::future::ready(page.clone())));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all("GET /page HTTP/1.1\r\nHost: x\r\n\r\n".repeat(400).as_bytes()).await.unwrap();
        let server = tokio::spawn(serve(listener, router, shutdown.clone()));
        tokio::time::sleep(UNREAD * 3).await;
        // No connection is left to wait for.
        shutdown.cancel();
        tokio::time::timeout(Duration::from_millis(100), server).await.expect("it holds its place").unwrap();
        let mut answers = Vec::new();
        let _ = client.read_to_end(&mut answers).await;
        assert!((1 << 16..400 << 16).contains(&answers.len()), "{}", answers.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_has_its_time_for_each_answer_and_not_for_each_byte() {
        let (mut reader, inner) = tokio::io::duplex(4);
        let mut stream = Prefixed::new(Vec::new(), inner);
        for _ in 0..3 {
            let answer = async {
                stream.write_all(b"answer").await.unwrap();
                stream.flush().await.unwrap();
            };
            let read = async {
                tokio::time::sleep(UNREAD - Duration::from_secs(1)).await;
                reader.read_exact(&mut [0; 6]).await.unwrap();
            };
            tokio::join!(answer, read);
        }
        let started = Instant::now();
        let answer = async {
            let error = stream.write_all(&[b'x'; 100]).await.unwrap_err();
            assert_eq!((error.kind(), started.elapsed()), (io::ErrorKind::TimedOut, UNREAD));
        };
        let drip = async {
            loop {
                tokio::time::sleep(Duration::from_secs(3)).await;
                reader.read_exact(&mut [0; 1]).await.unwrap();
            }
        };
        tokio::select! { () = answer => {} () = drip => {} }
    }

    #[tokio::test]
    async fn shutdown_closes_idle_connections_and_returns() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(serve(listener, router(), shutdown.clone()));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut start = [0; 12];
        client.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        shutdown.cancel();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        server.await.unwrap();
    }
}
