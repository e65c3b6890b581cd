//! How it scales: a model with a handful of measured constants, checked against 1, 4 and 16 node processes, and then asked
//! about sizes that no test machine has.

use std::time::Duration;

use broadcastd::command::bench::Figures;
use broadcastd::command::bench::herd::Herd;
use broadcastd::command::bench::server::Server;
use broadcastd::ledger::Ledger;
use tokio::runtime::Runtime;

use crate::node::ours::{accept, herd_on, ledger, plan};
use crate::support::broadcastd::{App, Process};
use crate::support::redis::Redis;
use crate::support::stack::Stack;

/// Broadcasts that each point is the mean of.
const BROADCASTS: u32 = 200;
/// Devices of a node process.
const DEVICES: usize = 500;
/// Bytes of a broadcast's body.
const BODY: usize = 125;

/// The constants; times in µs.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    /// Redis CPU of one acceptance, without any node.
    pub accept: f64,
    /// Redis CPU for each node that it is published to.
    pub publish: f64,
    /// Bytes that Redis sends to each node for a broadcast.
    pub bytes: f64,
    /// A node's CPU for each device that it delivers to.
    pub delivery: f64,
    /// A node's CPU for a broadcast, whoever is online.
    pub envelope: f64,
    /// A node's CPU for a login.
    pub login: f64,
    /// Redis CPU of a node's join of an app with 100 retained.
    pub join: f64,
}

/// What the model says of one installation.
#[derive(Debug, Clone, Copy)]
pub struct Prediction {
    /// Redis CPU a broadcast, µs.
    pub redis: f64,
    /// Broadcasts a second that one Redis core takes.
    pub most: f64,
    /// Bytes a broadcast, Redis to nodes.
    pub bytes: f64,
    /// Until the last device has it, seconds.
    pub last: f64,
    /// Until a lost node's devices are back, seconds.
    pub node_lost: f64,
    /// Until every node has read its apps again after Redis was lost, seconds.
    pub redis_lost: f64,
}

impl Model {
    /// `nodes` of `cores` each, `devices` in all, `apps` that every node serves, `accepts` logins a second that a node takes.
    pub fn predict(&self, nodes: f64, cores: f64, devices: f64, apps: f64, accepts: f64) -> Prediction {
        let redis = self.accept + self.publish * nodes;
        let each = devices / nodes;
        // A core serves its own connections; the next one's envelope is published after the one before.
        let sweep = each / cores * self.delivery;
        let others = (nodes - 1.0).max(1.0);
        let logins = accepts.min(cores * 1e6 / self.login);
        Prediction {
            redis,
            most: 1e6 / redis,
            bytes: self.bytes * nodes,
            last: (redis + self.envelope + sweep) / 1e6,
            node_lost: each / others / logins,
            redis_lost: self.join * nodes * apps / 1e6,
        }
    }
}

/// `floor`: constants of the node measured elsewhere in the same run are taken again here, so that it stands alone.
pub fn run(runtime: &Runtime) {
    println!("## Scale\n");
    let one = point(runtime, 1);
    let four = point(runtime, 4);
    let sixteen = point(runtime, 16);
    let publish = (four.redis - one.redis) / 3.0;
    let model = Model {
        accept: one.redis - publish,
        publish,
        bytes: one.bytes,
        delivery: one.delivery,
        envelope: one.envelope,
        login: one.login,
        join: one.join,
    };
    println!("Constants (µs of CPU, bytes), from one and four node processes: {model:.1?}\n");
    println!("| node processes | Redis CPU a broadcast | model | bytes | model |\n|---|---|---|---|---|");
    for (nodes, point) in [(1.0, one), (4.0, four), (16.0, sixteen)] {
        let said = model.predict(nodes, 1.0, nodes * 500.0, 1.0, 5000.0);
        println!(
            "| {nodes:.0} | {:.1} µs | {:.1} µs | {:.0} | {:.0} |",
            point.redis, said.redis, point.bytes_in_all, said.bytes
        );
    }
    println!("\nThe model, with nodes of 16 cores, 100 apps and 5,000 logins a second and node:\n");
    println!(
        "| nodes | devices | a node | Redis CPU a broadcast | broadcasts/s a Redis core | MB a broadcast | to the last | \
         a node's devices back after | all read again after Redis was lost |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (nodes, devices) in
        [(1.0, 1e5), (10.0, 1e6), (50.0, 5e6), (100.0, 1e7), (200.0, 2e7), (500.0, 5e7), (1000.0, 1e8)]
    {
        let said = model.predict(nodes, 16.0, devices, 100.0, 5000.0);
        println!(
            "| {nodes:.0} | {devices:.0} | {:.0} | {:.0} µs | {:.0} | {:.2} | {:.0} ms | {:.1} s | {:.1} s |",
            devices / nodes,
            said.redis,
            said.most,
            said.bytes / 1e6,
            said.last * 1e3,
            said.node_lost,
            said.redis_lost
        );
    }
    println!();
}

#[derive(Debug, Clone, Copy)]
struct Point {
    redis: f64,
    bytes: f64,
    bytes_in_all: f64,
    delivery: f64,
    envelope: f64,
    login: f64,
    join: f64,
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn cpu(pid: u32) -> f64 {
    micros(Server::Process(pid).usage().unwrap().unwrap().cpu)
}

#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn point(runtime: &Runtime, nodes: usize) -> Point {
    let redis = Redis::dedicated(&[]);
    let app = App::unlimited();
    let stack = Stack::on("amqp://127.0.0.1:1", &redis.url(), std::slice::from_ref(&app));
    let processes: Vec<Process> = runtime.block_on(async {
        let node =
            || stack.role("node").with("log.level", "warn").with("node.shards", "1").with("node.ping_seconds", "600");
        futures_util::future::join_all((0..nodes).map(|_| node().start())).await
    });
    let before: f64 = processes.iter().map(|node| cpu(node.pid())).sum();
    let mut herds: Vec<Herd> = processes.iter().map(|node| herd_on(&plan(&app, node.public_port(), DEVICES))).collect();
    let after: f64 = processes.iter().map(|node| cpu(node.pid())).sum();
    let login = (after - before) / (nodes * DEVICES) as f64;
    let ledger = runtime.block_on(ledger(&redis, &stack));
    let send = |count| runtime.block_on(accept(&ledger, &app, count, BODY, false));
    send(20);
    std::thread::sleep(Duration::from_millis(500));

    // What Redis does by itself (probes, renewals) is taken off.
    let rest = Duration::from_secs(2);
    let (idle_cpu, idle_bytes) = (cpu(redis.pid()), output_bytes(&redis));
    std::thread::sleep(rest);
    let (idle_cpu, idle_bytes) = ((cpu(redis.pid()) - idle_cpu) / 2.0, (output_bytes(&redis) - idle_bytes) / 2.0);

    let (start, cpu_start, bytes_start) = (std::time::Instant::now(), cpu(redis.pid()), output_bytes(&redis));
    (0..BROADCASTS).for_each(|_| send(1));
    let seconds = start.elapsed().as_secs_f64();
    let count = f64::from(BROADCASTS);
    let used = (cpu(redis.pid()) - cpu_start - idle_cpu * seconds) / count;
    let bytes = (output_bytes(&redis) - bytes_start - idle_bytes * seconds) / count;

    // One node's share, with everyone and with (nearly) nobody online.
    let mut figures = Figures::default();
    let server = Server::Process(processes[0].pid());
    for _ in 0..15 {
        figures
            .round(&mut herds[0], &server, 1, || {
                send(1);
                Ok(())
            })
            .unwrap();
    }
    let delivery = figures.median_cpu().unwrap_or(0) as f64 / 1000.0;
    herds.truncate(0);
    let herd = herd_on(&plan(&app, processes[0].public_port(), 1));
    let node_start = cpu(processes[0].pid());
    (0..BROADCASTS).for_each(|_| send(1));
    let envelope = (cpu(processes[0].pid()) - node_start) / count;
    drop(herd);

    // 100 retained, read by a node that comes.
    runtime.block_on(accept(&ledger, &app, 100, BODY, true));
    let join_start = cpu(redis.pid());
    for number in 0..50 {
        let name = broadcastd::ledger::NodeName(format!("join-{number}").into());
        let key = broadcastd::broadcast::app::AppKey::parse(&app.key).unwrap();
        runtime.block_on(async {
            ledger.join(&key, &name, Duration::from_secs(1), 0).await.unwrap();
            ledger.leave(&key, &name).await.unwrap();
        });
    }
    let join = (cpu(redis.pid()) - join_start) / 50.0;
    Point { redis: used, bytes: bytes / nodes as f64, bytes_in_all: bytes, delivery, envelope, login, join }
}

fn output_bytes(redis: &Redis) -> f64 {
    let stats = redis.command(&["INFO", "stats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:"));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0.0)
}
