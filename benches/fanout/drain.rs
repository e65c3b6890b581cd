//! How fast a queue is drained, and what it costs the worker: against the floor, in turn, in one run.

use std::time::{Duration, Instant};

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::FieldTable;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machine::cpu;
use crate::support::broadcastd::{App, Process};
use crate::support::guard::Guarded;
use crate::support::rabbitmq::{ADMINISTRATOR, RabbitMq, as_user};
use crate::support::redis::{LOGIN, Redis};
use crate::support::stack::Stack;
use crate::support::until;

const APPS: usize = 100;
const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);
/// Prefetch and batches are full, connections are open: measured from here on.
const WARM: u64 = 2000;

struct Figure {
    rate: f64,
    micros: f64,
}

/// `[NODES…]`: only these rows.
pub async fn run(only: &[String]) {
    println!("## Worker: {APPS} apps, requests waiting in a quorum queue, no reply wanted, median of {ROUNDS}\n");
    println!(
        "| leased nodes | worker, requests/s | worker, CPU each | floor, requests/s | floor, CPU each | CPU ÷ floor |"
    );
    println!("|---|---|---|---|---|---|");
    for (nodes, count) in [(1, 40_000), (10, 30_000), (100, 12_000)] {
        if !only.is_empty() && !only.contains(&nodes.to_string()) {
            continue;
        }
        let (mut worker, mut floor) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            worker.push(measure(nodes, count, true).await);
            floor.push(measure(nodes, count, false).await);
        }
        let mut ratios: Vec<f64> =
            worker.iter().zip(&floor).map(|(worker, floor)| worker.micros / floor.micros).collect();
        ratios.sort_by(f64::total_cmp);
        let (worker, floor) = (median(worker), median(floor));
        println!(
            "| {nodes} | {:.0} | {:.0} µs | {:.0} | {:.0} µs | {:.2} |",
            worker.rate,
            worker.micros,
            floor.rate,
            floor.micros,
            ratios[ROUNDS / 2]
        );
    }
    println!();
}

fn median(mut figures: Vec<Figure>) -> Figure {
    figures.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    figures.remove(figures.len() / 2)
}

/// Drains `count` requests with a fresh Redis and queue.
async fn measure(nodes: usize, count: u64, worker: bool) -> Figure {
    let redis = Redis::dedicated(&[]);
    let apps: Vec<App> = (0..APPS)
        .map(|app| App { key: format!("bench-{app}"), per_minute: 4_000_000_000, per_day: 4_000_000_000, ..App::new() })
        .collect();
    let stack = Stack::on(&RabbitMq::shared().vhost().url, &redis.url(), &apps);
    // Declares the queue as the worker wants it, and stops again.
    let mut process = stack.worker().await;
    process.drain(PATIENCE).await;
    fill(&stack, count).await;
    let subscribers = subscribe(&redis, &stack, nodes).await;
    redis.command(&["CONFIG", "RESETSTAT"]);

    let (pid, _running) = if worker {
        process = process.with("log.level", "warn");
        process.spawn();
        (process.pid(), Running::Worker(process))
    } else {
        let program = std::env::current_exe().unwrap();
        let apps = APPS.to_string();
        // It loads the script, which broadcastd's own user has no need to.
        let redis_url = stack.redis_url.replace(&format!("{LOGIN}@"), "");
        let arguments = [program.to_str().unwrap(), "floor", &stack.amqp_url, &redis_url, &stack.prefix, &apps];
        let floor = Guarded::spawn("floor", &arguments, &Default::default(), &redis.folder().join("floor"));
        (floor.pid(), Running::Floor(floor))
    };
    reached(&redis, WARM).await;
    let (start, cpu_start, done_start) = (Instant::now(), cpu(pid), calls(&redis));
    reached(&redis, count).await;
    let (elapsed, used, done) = (start.elapsed(), cpu(pid) - cpu_start, calls(&redis) - done_start);
    subscribers.iter().for_each(tokio::task::JoinHandle::abort);
    #[allow(clippy::cast_precision_loss)]
    let done = done as f64;
    Figure { rate: done / elapsed.as_secs_f64(), micros: used.as_secs_f64() * 1e6 / done }
}

#[allow(dead_code, reason = "held for its end")]
enum Running {
    Worker(Process),
    Floor(Guarded),
}

/// How often the script was called: the one figure that both subjects leave at the same place.
fn calls(redis: &Redis) -> u64 {
    let stats = redis.command(&["INFO", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls="));
    line.and_then(|line| line.split(',').next()).and_then(|calls| calls.parse().ok()).unwrap_or(0)
}

async fn reached(redis: &Redis, count: u64) {
    until("drained", PATIENCE, async || {
        let calls = calls(redis);
        if calls >= count { Ok(()) } else { Err(format!("{calls} of {count}")) }
    })
    .await;
}

/// Fills the queue, confirmed.
async fn fill(stack: &Stack, count: u64) {
    let url = as_user(&stack.amqp_url, ADMINISTRATOR);
    let connection = lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    channel.queue_purge("broadcast.requests".into(), QueuePurgeOptions::default()).await.unwrap();
    for i in 0..count {
        let request = serde_json::json!({
            "requestId": format!("{i:08}"), "appKey": format!("bench-{}", i as usize % APPS), "from": "ops",
            "body": "Maintenance tonight from 22:00 to 23:00 UTC. Please save your work.",
        });
        let properties = BasicProperties::default().with_delivery_mode(2);
        let body = request.to_string();
        channel
            .basic_publish(
                "broadcast".into(),
                "request".into(),
                BasicPublishOptions::default(),
                body.as_bytes(),
                properties,
            )
            .await
            .unwrap();
        if i % 5000 == 4999 {
            channel.wait_for_confirms().await.unwrap();
        }
    }
    channel.wait_for_confirms().await.unwrap();
    until("queued", PATIENCE, async || {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare("broadcast.requests".into(), options, FieldTable::default()).await.unwrap();
        if u64::from(queue.message_count()) == count { Ok(()) } else { Err(queue.message_count()) }
    })
    .await;
}

/// Leases for `nodes` nodes in every app, and a connection each that is subscribed and reads, at the least cost.
async fn subscribe(redis: &Redis, stack: &Stack, nodes: usize) -> Vec<tokio::task::JoinHandle<()>> {
    let mut readers = Vec::new();
    for node in 0..nodes {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", redis.port())).await.unwrap();
        let mut command = String::from("SUBSCRIBE");
        for app in 0..APPS {
            command += &format!(" {}{{bench-{app}}}:node:n{node}", stack.prefix);
            redis_inline(&mut stream, &format!("ZADD {}{{bench-{app}}}:nodes 9999999999999 n{node}", stack.prefix))
                .await;
        }
        redis_inline(&mut stream, &command).await;
        readers.push(tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 20];
            while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        }));
    }
    until("subscribed", PATIENCE, async || {
        let clients =
            redis.command(&["PUBSUB", "NUMSUB", &format!("{}{{bench-99}}:node:n{}", stack.prefix, nodes - 1)]);
        if clients.contains('1') { Ok(()) } else { Err(clients) }
    })
    .await;
    readers
}

async fn redis_inline(stream: &mut tokio::net::TcpStream, command: &str) {
    stream.write_all(format!("{command}\r\n").as_bytes()).await.unwrap();
}
