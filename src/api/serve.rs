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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at once. On a listener, further ones wait in its backlog; handed-over ones are closed.
pub const MAX_CONNECTIONS: usize = 2048;
/// How long the head of a request may take; also how long a connection may be idle between two.
const HEAD: Duration = Duration::from_secs(30);

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
pub async fn serve_handed_over(
    mut receiver: mpsc::Receiver<(std::net::TcpStream, Vec<u8>)>,
    router: Router,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let handed_over = tokio::select! {
            handed_over = receiver.recv() => handed_over,
            () = shutdown.cancelled() => break,
        };
        let Some((stream, prefix)) = handed_over else { break };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            tracing::warn!(most = MAX_CONNECTIONS, "too many HTTP connections; closed one");
            continue;
        };
        match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
            Ok(stream) => {
                connections.spawn(connection(Prefixed::new(prefix, stream), router.clone(), permit, shutdown.clone()));
            }
            Err(error) => tracing::warn!(%error, "cannot take a connection over"),
        }
    }
    connections.close();
    connections.wait().await;
}

async fn connection(
    stream: Prefixed<TcpStream>,
    router: Router,
    permit: OwnedSemaphorePermit,
    shutdown: CancellationToken,
) {
    let _permit = permit;
    // Answers are small and whole: waiting for more to send would only delay them. An error shows at the first write.
    let _ = stream.inner.set_nodelay(true);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(served);
    // An error is a client that went away or sends something else than HTTP: no news.
    tokio::select! {
        _ = served.as_mut() => return,
        () = shutdown.cancelled() => served.as_mut().graceful_shutdown(),
    }
    let _ = served.await;
}

/// A stream whose first bytes have been read already.
struct Prefixed<S> {
    prefix: Vec<u8>,
    position: usize,
    inner: S,
}

impl<S> Prefixed<S> {
    const fn new(prefix: Vec<u8>, inner: S) -> Self {
        Self { prefix, position: 0, inner }
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
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
        client.write_all(b"TP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hi"), "{answer}");
        shutdown.cancel();
        server.await.unwrap();
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
