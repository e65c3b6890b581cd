//! From the AMQP publish to the first and to the last of many devices, at rest: one broadcast at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore};

use crate::machine::{percentile, show};
use crate::support::broadcastd::App;
use crate::support::device::token;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::Redis;
use crate::support::sender::request;
use crate::support::stack::Stack;

const DEVICES: usize = 5000;
const ROUNDS: usize = 60;

/// What the devices write into as a broadcast arrives.
struct Finish {
    start: Instant,
    first: AtomicU64,
    last: AtomicU64,
    arrived: AtomicUsize,
    all: Notify,
}

impl Finish {
    fn arrive(&self) {
        let nanos = u64::try_from(self.start.elapsed().as_nanos()).unwrap();
        self.first.fetch_min(nanos, Ordering::Relaxed);
        self.last.fetch_max(nanos, Ordering::Relaxed);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == DEVICES {
            self.all.notify_one();
        }
    }
}

pub async fn run() {
    let app = App::unlimited();
    let redis = Redis::dedicated(&[]);
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), std::slice::from_ref(&app));
    let worker = stack.role("worker").with("log.level", "warn").start().await;
    let node = stack.role("node").with("log.level", "warn").start().await;
    let finish = Arc::new(Finish {
        start: Instant::now(),
        first: AtomicU64::new(u64::MAX),
        last: AtomicU64::new(0),
        arrived: AtomicUsize::new(0),
        all: Notify::new(),
    });
    let logging_in = Arc::new(Semaphore::new(64));
    let mut logins = Vec::new();
    let mut devices = Vec::new();
    let token = token(&app.key, "bench", &app.secret, 3600);
    for _ in 0..DEVICES {
        let permit = logging_in.clone().acquire_owned().await.unwrap();
        let (port, key, token, finish) = (node.public_port(), app.key.clone(), token.clone(), finish.clone());
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        devices.push(tokio::spawn(async move {
            let mut stream = connect(port, &key, &token).await;
            drop(permit);
            let _ = ready.send(());
            let mut buffer = [0; 1024];
            // One frame at a time fits: the next broadcast is only sent when all have this one. Pings are two bytes.
            while let Ok(length) = stream.read(&mut buffer).await {
                if length == 0 {
                    panic!("a device was disconnected");
                }
                if length > 64 {
                    finish.arrive();
                } else {
                    stream.write_all(&[0x8a, 0x80, 0, 0, 0, 0]).await.unwrap();
                }
            }
        }));
        logins.push(is_ready);
    }
    for login in logins {
        login.await.unwrap();
    }

    let amqp = stack.amqp().await;
    let (mut firsts, mut lasts) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS + 5 {
        finish.first.store(u64::MAX, Ordering::Relaxed);
        finish.last.store(0, Ordering::Relaxed);
        finish.arrived.store(0, Ordering::Release);
        let request = request(&app, &"x".repeat(100)).to_string();
        let published = u64::try_from(finish.start.elapsed().as_nanos()).unwrap();
        amqp.send(request.as_bytes()).await;
        tokio::time::timeout(Duration::from_secs(30), finish.all.notified()).await.expect("every device has it");
        // The first rounds warm caches and connections up.
        if round >= 5 {
            firsts.push(Duration::from_nanos(finish.first.load(Ordering::Relaxed) - published));
            lasts.push(Duration::from_nanos(finish.last.load(Ordering::Relaxed) - published));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    firsts.sort();
    lasts.sort();
    println!("## Latency: AMQP publish to {DEVICES} devices on one node, one broadcast at a time, {ROUNDS} rounds");
    println!("(the devices run on the same machine and cost it more than the node does)\n");
    println!("| | p50 | p99 |\n|---|---|---|");
    for (name, values) in [("first device", &firsts), ("last device", &lasts)] {
        println!("| {name} | {} | {} |", show(percentile(values, 0.5)), show(percentile(values, 0.99)));
    }
    println!();
    // Before the servers end, which they would report.
    devices.iter().for_each(tokio::task::JoinHandle::abort);
    drop((worker, node));
}

async fn connect(port: u16, app: &str, token: &str) -> tokio::net::TcpStream {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let upgrade = "GET /ws HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    stream.write_all(upgrade.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 4096];
    let length = stream.read(&mut buffer).await.unwrap();
    assert!(buffer[..length].starts_with(b"HTTP/1.1 101"), "not upgraded");
    let login = serde_json::json!({
        "type": "login", "app": app, "account": "bench", "device": "bench", "platform": "web", "token": token, "since": 0,
    })
    .to_string();
    // A masked text frame; the mask of zeros leaves the bytes as they are.
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend(u16::try_from(login.len()).unwrap().to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(login.as_bytes());
    stream.write_all(&frame).await.unwrap();
    let length = stream.read(&mut buffer).await.unwrap();
    assert!(String::from_utf8_lossy(&buffer[..length]).contains("welcome"), "not welcome");
    stream
}
