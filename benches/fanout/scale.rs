//! How it scales: a model with a handful of measured constants, taken at 1 and 16 node processes and checked at 4, and then asked
//! about sizes that no test machine has. docs/SCALE.md explains it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use broadcastd::broadcast::app::AppKey;
use broadcastd::command::bench::Figures;
use broadcastd::command::bench::fleet::{Order, monotonic};
use broadcastd::command::bench::herd::Herd;
use broadcastd::command::bench::server::Server;
use broadcastd::ledger::redis::RedisLedger;
use broadcastd::ledger::{Ledger, NodeName};
use tokio::runtime::Runtime;

use crate::node::ours::{self, Case, accept, herd_on, ledger, pin, plan};
use crate::node::{connect, enter, round};
use crate::support::broadcastd::{App, Process};
use crate::support::redis::Redis;
use crate::support::stack::Stack;

/// Samples that each figure is the median of.
const SAMPLES: usize = 15;
/// Broadcasts that a busy worker has decided in one round trip.
const BATCH: u32 = 64;
/// Devices of each node process where deliveries are timed.
const DEVICES: usize = 500;
/// Bytes of a broadcast's body.
const BODY: usize = 125;
/// Joins that a sample is the mean of.
const JOINS: u32 = 20;

/// A cost that grows with the number of nodes: `once + each × nodes`.
#[derive(Debug, Clone, Copy)]
struct Line {
    once: f64,
    each: f64,
}

impl Line {
    /// Through the points of one and of sixteen nodes: the further apart, the less what drifts in between tilts it.
    fn through(one: f64, sixteen: f64) -> Self {
        let each = (sixteen - one) / 15.0;
        Self { once: one - each, each }
    }

    fn at(self, nodes: f64) -> f64 {
        self.once + self.each * nodes
    }
}

/// The constants; times in µs.
#[derive(Debug, Clone, Copy)]
struct Model {
    /// Redis CPU of a broadcast, one at a time.
    alone: Line,
    /// The same where [`BATCH`] are decided in one round trip.
    busy: Line,
    /// Bytes that Redis sends for a broadcast.
    bytes: Line,
    /// A node's CPU for each device that it delivers to.
    delivery: f64,
    /// A node's CPU for a broadcast, whoever is online.
    envelope: f64,
    /// A node's CPU for a login.
    login: f64,
    /// Redis CPU of a node's join of an app with 100 retained, and of its leaving.
    join: f64,
}

/// What the model says of one installation.
#[derive(Debug, Clone, Copy)]
struct Prediction {
    /// Broadcasts a second that one Redis core takes.
    most: f64,
    /// Bytes a broadcast, Redis to nodes.
    bytes: f64,
    /// From the decision until the last device has it, ms.
    last_ms: f64,
    /// Until a lost node's devices are back, seconds.
    node_lost: f64,
    /// Redis CPU until every node has read its apps again after Redis was lost, seconds.
    redis_lost: f64,
}

impl Model {
    /// `nodes` of `cores` each, `devices` in all, `apps` that every node serves, `accepts` logins a second that a node takes.
    fn predict(&self, nodes: f64, cores: f64, devices: f64, apps: f64, accepts: f64) -> Prediction {
        let each = devices / nodes;
        // A core serves its own connections; the last node is published to after all the others.
        let sweep = each / cores * self.delivery;
        let others = (nodes - 1.0).max(1.0);
        let logins = accepts.min(cores * 1e6 / self.login);
        Prediction {
            most: 1e6 / self.busy.at(nodes),
            bytes: self.bytes.at(nodes),
            last_ms: (self.alone.at(nodes) + self.envelope + sweep) / 1e3,
            node_lost: each / others / logins,
            redis_lost: self.join * nodes * apps / 1e6,
        }
    }
}

/// Takes every constant itself, so that it stands alone.
pub fn run(runtime: &Runtime) {
    if !enter("scale", &[]) {
        return;
    }
    println!("## Scale\n");
    let [one, four, sixteen] = points(runtime, [1, 4, 16]);
    let (delivery, envelope, login) = node(runtime);
    let model = Model {
        alone: Line::through(one.alone, sixteen.alone),
        busy: Line::through(one.busy, sixteen.busy),
        bytes: Line::through(one.bytes, sixteen.bytes),
        delivery,
        envelope,
        login,
        join: join(runtime),
    };
    println!("| constant | once | each node |\n|---|---|---|");
    for (name, line) in [
        ("Redis CPU of a broadcast, one at a time, µs", model.alone),
        ("… 64 in a round trip, µs", model.busy),
        ("bytes from Redis a broadcast", model.bytes),
    ] {
        println!("| {name} | {:.1} | {:.1} |", line.once, line.each);
    }
    println!(
        "\nA node's CPU: {delivery:.2} µs a delivery, {envelope:.0} µs a broadcast, {login:.0} µs a login. Redis' CPU of a join with \
         100 retained: {:.0} µs.\n",
        model.join
    );
    println!(
        "Lines through what 1 and 16 node processes show, and what 4 show beside them:\n\n\
         | node processes | Redis CPU, one at a time | line | 64 in a round trip | line | bytes | line | last of {DEVICES} \
         devices a node, all on one core | line |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    // Nodes and devices share one core here: their work is one after the other.
    let last = Line::through(one.last, sixteen.last);
    for (nodes, point) in [(1.0, &one), (4.0, &four), (16.0, &sixteen)] {
        println!(
            "| {nodes:.0} | {:.1} µs | {:.1} | {:.1} µs | {:.1} | {:.0} | {:.0} | {:.1} ms | {:.1} |",
            point.alone,
            model.alone.at(nodes),
            point.busy,
            model.busy.at(nodes),
            point.bytes,
            model.bytes.at(nodes),
            point.last / 1e3,
            last.at(nodes) / 1e3,
        );
    }
    println!("\nThe model, with nodes of 16 cores, 100 apps and 5,000 logins a second and node:\n");
    println!(
        "| nodes | devices | a node | broadcasts/s a Redis core | MB a broadcast | to the last | a lost node's devices are back \
         after | Redis CPU of reading everything again |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (nodes, devices) in
        [(1.0, 1e5), (10.0, 1e6), (50.0, 5e6), (100.0, 1e7), (200.0, 2e7), (500.0, 5e7), (1000.0, 1e8)]
    {
        let said = model.predict(nodes, 16.0, devices, 100.0, 5000.0);
        println!(
            "| {nodes:.0} | {devices:.0} | {:.0} | {:.0} | {:.3} | {:.0} ms | {:.1} s | {:.1} s |",
            devices / nodes,
            said.most,
            said.bytes / 1e6,
            said.last_ms,
            said.node_lost,
            said.redis_lost
        );
    }
    println!();
}

/// What was measured with so many node processes; times in µs.
struct Point {
    alone: f64,
    busy: f64,
    bytes: f64,
    /// Until the last device of all nodes had a broadcast.
    last: f64,
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn cpu(pid: u32) -> f64 {
    micros(Server::Process(pid).usage().unwrap().unwrap().cpu)
}

fn unlimited_nodes(runtime: &Runtime, stack: &Stack, nodes: usize) -> Vec<Process> {
    let node = || {
        let node = stack.role("node").with("log.level", "warn").with("node.shards", "1");
        node.with("node.ping_seconds", "600").start()
    };
    runtime.block_on(async { futures_util::future::join_all((0..nodes).map(|_| node())).await })
}

/// So many node processes on a Redis of their own, which has the first core to itself; nodes and devices share the second one.
struct Stand {
    /// Before the nodes, which they would miss.
    herds: Vec<Herd>,
    redis: Redis,
    app: App,
    processes: Vec<Process>,
    ledger: Arc<RedisLedger>,
    /// What Redis does by itself (probes, renewals): µs and bytes a second.
    idle: (f64, f64),
    alone: Vec<f64>,
    busy: Vec<f64>,
    bytes: Vec<f64>,
    lasts: Vec<f64>,
}

impl Stand {
    fn new(runtime: &Runtime, nodes: usize) -> Self {
        let redis = Redis::dedicated(&[]);
        pin(redis.pid(), "0");
        let app = App::unlimited();
        let stack = Stack::on("amqp://127.0.0.1:1", &redis.url(), std::slice::from_ref(&app));
        let processes = unlimited_nodes(runtime, &stack, nodes);
        processes.iter().for_each(|process| pin(process.pid(), "1"));
        // One device each, so that they serve the app.
        let herds = processes.iter().map(|node| herd_on(&plan(&app, node.public_port(), 1))).collect();
        let ledger = runtime.block_on(ledger(&redis, &stack));
        let (alone, busy, bytes, lasts) = Default::default();
        Self { redis, app, processes, ledger, herds, idle: (0.0, 0.0), alone, busy, bytes, lasts }
    }

    /// Redis' CPU in µs and the bytes that it has sent.
    fn used(&self) -> (f64, f64) {
        (cpu(self.redis.pid()), output_bytes(&self.redis))
    }

    fn send(&self, runtime: &Runtime, count: u32) {
        runtime.block_on(accept(&self.ledger, &self.app, count, BODY, false));
    }

    /// What Redis uses for each of so many broadcasts, in batches of so many, without what it does by itself.
    fn sample(&self, runtime: &Runtime, count: u32, batch: u32) -> (f64, f64) {
        let (start, before) = (Instant::now(), self.used());
        (0..count / batch).for_each(|_| self.send(runtime, batch));
        let (seconds, after) = (start.elapsed().as_secs_f64(), self.used());
        let each = |before: f64, after: f64, idle: f64| (after - before - idle * seconds) / f64::from(count);
        (each(before.0, after.0, self.idle.0), each(before.1, after.1, self.idle.1))
    }

    /// Until the last device of all nodes has a broadcast, µs.
    #[allow(clippy::cast_precision_loss, reason = "for reading")]
    fn last(&mut self, runtime: &Runtime) -> f64 {
        self.herds.iter_mut().for_each(|herd| herd.order(Order::Expect(1)).unwrap());
        let start = monotonic();
        self.send(runtime, 1);
        let last = self.herds.iter_mut().map(|herd| *herd.arrived().unwrap().1.last().unwrap()).max().unwrap();
        (last - start) as f64 / 1e3
    }
}

/// Measures with so many node processes each, in turn, many times over: what drifts on the machine drifts for all.
fn points<const N: usize>(runtime: &Runtime, nodes: [usize; N]) -> [Point; N] {
    let mut stands = nodes.map(|nodes| Stand::new(runtime, nodes));
    for stand in &mut stands {
        stand.send(runtime, BATCH);
        let before = stand.used();
        std::thread::sleep(Duration::from_secs(2));
        let after = stand.used();
        stand.idle = ((after.0 - before.0) / 2.0, (after.1 - before.1) / 2.0);
    }
    for _ in 0..SAMPLES {
        for stand in &mut stands {
            let (alone, bytes) = stand.sample(runtime, BATCH, 1);
            let (busy, _) = stand.sample(runtime, 4 * BATCH, BATCH);
            stand.alone.push(alone);
            stand.bytes.push(bytes);
            stand.busy.push(busy);
        }
    }
    for stand in &mut stands {
        let plans = stand.processes.iter().map(|node| plan(&stand.app, node.public_port(), DEVICES));
        stand.herds = plans.map(|plan| herd_on(&plan)).collect();
    }
    for _ in 0..SAMPLES {
        for stand in &mut stands {
            let last = stand.last(runtime);
            stand.lasts.push(last);
        }
    }
    stands.map(|stand| Point {
        alone: median(stand.alone),
        busy: median(stand.busy),
        bytes: median(stand.bytes),
        last: median(stand.lasts),
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A node's CPU, alone on the first core: a delivery, a broadcast with nearly nobody online, a login.
#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn node(runtime: &Runtime) -> (f64, f64, f64) {
    let devices = 5000;
    let mut online = connect(runtime.block_on(ours::start(Case::new(devices))));
    let mut figures = Figures::default();
    (0..SAMPLES).for_each(|_| round(&mut online, &mut figures, 1));
    let (delivery, login) = (figures.median_cpu().unwrap() as f64 / 1e3, micros(online.login.cpu) / devices as f64);
    let mut few = connect(runtime.block_on(ours::start(Case::new(1))));
    let mut figures = Figures::default();
    (0..20 * SAMPLES).for_each(|_| round(&mut few, &mut figures, 1));
    (delivery, figures.median_cpu().unwrap() as f64 / 1e3, login)
}

/// Redis' CPU of a node's join of an app that has 100 retained, and of its leaving.
fn join(runtime: &Runtime) -> f64 {
    let redis = Redis::dedicated(&[]);
    pin(redis.pid(), "0");
    let app = App::unlimited();
    let stack = Stack::on("amqp://127.0.0.1:1", &redis.url(), std::slice::from_ref(&app));
    let ledger = runtime.block_on(ledger(&redis, &stack));
    runtime.block_on(accept(&ledger, &app, 100, BODY, true));
    let key = AppKey::parse(&app.key).unwrap();
    let join = |ledger: &RedisLedger| {
        let name = NodeName("join".into());
        runtime.block_on(async {
            ledger.join(&key, &name, Duration::from_secs(1), 0).await.unwrap();
            ledger.leave(&key, &name).await.unwrap();
        });
    };
    let cost = || {
        let before = cpu(redis.pid());
        (0..JOINS).for_each(|_| join(&ledger));
        (cpu(redis.pid()) - before) / f64::from(JOINS)
    };
    median((0..SAMPLES).map(|_| cost()).collect())
}

fn output_bytes(redis: &Redis) -> f64 {
    let stats = redis.command(&["INFO", "stats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:"));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0.0)
}
