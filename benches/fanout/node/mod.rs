//! One broadcast to every device: our node, a bare send loop and each peer that is installed, in one run.
//!
//! It runs in a network namespace of its own, where what the loopback device receives is worked off on the second core: the
//! sender, on the first one, is not charged for the receiver. Without that right everyone is charged more, and the table says so.

pub mod floor;
pub mod ours;
mod subject;

use std::process::Command;
use std::time::Duration;

use broadcastd::command::bench::Figures;
use broadcastd::command::bench::fleet::Order;
use broadcastd::command::bench::herd::Herd;
use broadcastd::command::bench::server::{Server, Usage};
use tokio::runtime::Runtime;

use self::ours::Case;
use self::subject::Subject;

const DEVICES: usize = 10_000;
const ROUNDS: u32 = 15;
const BURST: u32 = 20;
const INSIDE: &str = "BROADCASTD_BENCH_NAMESPACE";

/// `peers`: only the comparison; `cases`: only our own cases; nothing: both.
pub fn run(runtime: &Runtime, arguments: &[String]) {
    if std::env::var_os(INSIDE).is_none() && enter(arguments) {
        return;
    }
    pin_self();
    let which = arguments.first().map_or("", String::as_str);
    let devices = arguments.get(1).map_or(DEVICES, |devices| devices.parse().unwrap());
    let isolated = std::env::var_os(INSIDE).is_some_and(|value| value == "isolated");
    println!("## Node: {devices} devices on one core, {} bytes a message\n", subject::BYTES);
    if !isolated {
        println!("No right to a network namespace: the senders are charged for the receivers' work too.\n");
    }
    if which != "cases" {
        compare(runtime, devices);
    }
    if which != "peers" {
        cases(runtime, devices);
    }
}

/// Runs this program again in a namespace of its own; `false` if that is not allowed.
fn enter(arguments: &[String]) -> bool {
    const SCRIPT: &str = "mount -t sysfs sysfs /sys && ip link set lo up && \
        echo 2 > /sys/class/net/lo/queues/rx-0/rps_cpus && exec env BROADCASTD_BENCH_NAMESPACE=isolated \"$@\"";
    let allowed = Command::new("unshare").args(["-n", "-m", "true"]).status().is_ok_and(|status| status.success());
    if !allowed || std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return false;
    }
    // The system keeps 1000 received packets a core and drops the others: a sender that is faster than the receivers would be
    // measured by TCP's retransmissions, 200 ms later.
    let backlog = Backlog::raise();
    let program = std::env::current_exe().unwrap();
    let status = Command::new("unshare")
        .args(["-n", "-m", "sh", "-c", SCRIPT, "sh"])
        .arg(program)
        .arg("node")
        .args(arguments)
        .status()
        .unwrap();
    drop(backlog);
    std::process::exit(status.code().unwrap_or(1));
}

/// How many received packets may wait on a core; put back when it is dropped.
struct Backlog(Option<String>);

impl Backlog {
    const FILE: &str = "/proc/sys/net/core/netdev_max_backlog";

    fn raise() -> Self {
        let before = std::fs::read_to_string(Self::FILE).ok();
        let is_low = before.as_ref().is_some_and(|text| text.trim().parse::<u32>().is_ok_and(|most| most < 100_000));
        Self(before.filter(|_| is_low && std::fs::write(Self::FILE, "100000").is_ok()))
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = std::fs::write(Self::FILE, before);
        }
    }
}

/// Everything but the servers runs on the second core.
fn pin_self() {
    let pid = std::process::id().to_string();
    let _ = Command::new("taskset").args(["-a", "-p", "-c", "1", &pid]).output();
}

/// A subject with its devices online.
struct Online {
    subject: Subject,
    herd: Herd,
    login: Usage,
}

fn connect(subject: Subject) -> Online {
    // What it allocates at its start is not its sessions'.
    let before = settled(&subject.server);
    let herd = ours::herd_on(&subject.plan);
    let after = settled(&subject.server);
    let login = Usage { cpu: after.cpu.saturating_sub(before.cpu), memory: after.memory.saturating_sub(before.memory) };
    Online { subject, herd, login }
}

/// The usage once it does nothing any more.
fn settled(server: &Server) -> Usage {
    let usage = || server.usage().unwrap().unwrap();
    let mut last = usage();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        let now = usage();
        if now.cpu.saturating_sub(last.cpu) < Duration::from_millis(1) {
            return now;
        }
        last = now;
    }
}

fn round(online: &mut Online, figures: &mut Figures, count: u32) {
    let Online { subject, herd, .. } = online;
    figures
        .round(herd, &subject.server, count, || {
            (subject.send)(count);
            Ok(())
        })
        .unwrap();
}

#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn ratio(value: u64, floor: u64) -> f64 {
    value as f64 / floor.max(1) as f64
}

fn each(duration: Duration, devices: usize) -> f64 {
    duration.as_secs_f64() * 1e6 / devices.max(1) as f64
}

/// Each subject in turn, its rounds alternating with the floor's.
fn compare(runtime: &Runtime, devices: usize) {
    let mut floor = connect(subject::floor(devices, (0, 0)));
    type Start<'a> = Box<dyn FnOnce() -> Option<Subject> + 'a>;
    let subjects: Vec<(&str, Start<'_>)> = vec![
        ("broadcastd", Box::new(|| Some(runtime.block_on(ours::start(Case::new(devices)))))),
        ("Bun", Box::new(|| subject::bun(devices))),
        ("nchan", Box::new(|| subject::nchan(devices))),
        ("ws", Box::new(|| subject::node("Node ws", "ws.mjs", "ws", "/", &[], devices))),
        (
            "Socket.IO",
            Box::new(|| {
                let path = "/socket.io/?EIO=4&transport=websocket";
                subject::node("Socket.IO", "socketio.mjs", "socket.io", path, &["40"], devices)
            }),
        ),
        ("Centrifugo", Box::new(|| subject::centrifugo(devices))),
    ];
    println!(
        "| server | CPU a delivery | ÷ send loop | {BURST} at once, CPU a delivery | time to the last | ÷ send loop | \
         memory a session | connecting, CPU each |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut absent = Vec::new();
    for (name, start) in subjects {
        let Some(subject) = start() else {
            absent.push(name);
            continue;
        };
        let mut online = connect(subject);
        let (mut ours, mut loops, mut burst) = (Figures::default(), Figures::default(), Figures::default());
        // The first round warms up.
        round(&mut online, &mut Figures::default(), 1);
        round(&mut floor, &mut Figures::default(), 1);
        for _ in 0..ROUNDS {
            round(&mut online, &mut ours, 1);
            round(&mut floor, &mut loops, 1);
        }
        for _ in 0..ROUNDS {
            round(&mut online, &mut burst, BURST);
        }
        let (cpu, floor_cpu) = (ours.median_cpu().unwrap_or(0), loops.median_cpu().unwrap_or(0));
        println!(
            "| {} | {:.2} µs | {:.2} | {:.2} µs | {:.0} ms | {:.2} | {:.2} KiB | {:.0} µs |",
            online.subject.name,
            micros(cpu),
            ratio(cpu, floor_cpu),
            micros(burst.median_cpu().unwrap_or(0)),
            micros(ours.median_last()) / 1000.0,
            ratio(ours.median_last(), loops.median_last()),
            each(Duration::from_micros(online.login.memory), devices) / 1024.0,
            each(online.login.cpu, devices),
        );
        if name == "broadcastd" {
            println!(
                "| send loop | {:.2} µs | 1 | | {:.0} ms | 1 | {:.2} KiB | {:.0} µs |",
                micros(floor_cpu),
                micros(loops.median_last()) / 1000.0,
                each(Duration::from_micros(floor.login.memory), devices) / 1024.0,
                each(floor.login.cpu, devices),
            );
        }
    }
    println!(
        "\nMedians of {ROUNDS} rounds, each beside a round of the send loop; nothing else differs between servers."
    );
    if !absent.is_empty() {
        println!("Not installed, so not measured: {}.", absent.join(", "));
    }
    println!();
}

/// What only our node has to show.
fn cases(runtime: &Runtime, devices: usize) {
    println!("| case | broadcastd | beside it | ratio |\n|---|---|---|---|");
    retained(runtime, devices / 10);
    stalled(runtime, devices);
    cores(runtime, devices);
    println!();
}

/// A login that is given 100 broadcasts of 1 KiB: against the kernel's cost of sending those bytes.
fn retained(runtime: &Runtime, devices: usize) {
    let ours = connect(runtime.block_on(ours::start(Case { retained: 100, ..Case::new(devices) })));
    let bare = connect(subject::floor(devices, (100, 1024)));
    let without = connect(runtime.block_on(ours::start(Case::new(devices))));
    let bare_without = connect(subject::floor(devices, (0, 0)));
    let cost = |with: &Online, without: &Online| with.login.cpu.saturating_sub(without.login.cpu);
    let (mine, kernel) = (cost(&ours, &without), cost(&bare, &bare_without));
    println!(
        "| login with 100 retained of 1 KiB: CPU above one without | {:.0} µs | {:.0} µs to send as many bytes | {:.2} |",
        each(mine, devices),
        each(kernel, devices),
        mine.as_secs_f64() / kernel.as_secs_f64()
    );
}

/// A tenth of the devices stops reading.
fn stalled(runtime: &Runtime, devices: usize) {
    let mut online = connect(runtime.block_on(ours::start(Case::new(devices))));
    let mut before = Figures::default();
    round(&mut online, &mut Figures::default(), 1);
    (0..ROUNDS).for_each(|_| round(&mut online, &mut before, 1));
    online.herd.order(Order::Stall(devices / 10)).unwrap();
    // Until their sockets are full: what is sent from here on waits in the node, as a cursor.
    let memory = settled(&online.subject.server).memory;
    for _ in 0..20 {
        round(&mut online, &mut Figures::default(), 500);
    }
    let mut after = Figures::default();
    (0..ROUNDS).for_each(|_| round(&mut online, &mut after, 1));
    let grown = settled(&online.subject.server).memory.saturating_sub(memory);
    println!(
        "| a tenth of the devices does not read: the others' time to the last | {:.0} ms | {:.0} ms before | {:.2} |",
        micros(after.median_last()) / 1000.0,
        micros(before.median_last()) / 1000.0,
        ratio(after.median_last(), before.median_last())
    );
    println!("| … and memory for each who does not read | {} bytes | | |", grown / (devices as u64 / 10));
}

/// How long after `start` the server last did anything.
fn until_idle(server: &Server, start: std::time::Instant) -> Duration {
    let cpu = || server.usage().unwrap().unwrap().cpu;
    let (mut used, mut busy_until) = (cpu(), start.elapsed());
    while start.elapsed().saturating_sub(busy_until) < Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(5));
        let now = cpu();
        if now.saturating_sub(used) > Duration::from_micros(500) {
            busy_until = start.elapsed();
        }
        used = now;
    }
    busy_until
}

/// One core and two, while nobody reads: the devices' side would need cores of its own.
fn cores(runtime: &Runtime, devices: usize) {
    let rate = |shards: usize, cpus: &'static str| {
        let mut online = connect(runtime.block_on(ours::start(Case { shards, cpus, ..Case::new(devices) })));
        round(&mut online, &mut Figures::default(), 1);
        online.herd.order(Order::Stall(devices)).unwrap();
        let wanted = 100;
        let start = std::time::Instant::now();
        for _ in 0..wanted {
            (online.subject.send)(1);
        }
        let took = until_idle(&online.subject.server, start);
        #[allow(clippy::cast_precision_loss, reason = "for reading")]
        let deliveries = (wanted * devices) as f64;
        deliveries / took.as_secs_f64()
    };
    let (one, two) = (rate(1, "0"), rate(2, "0,1"));
    println!("| deliveries a second on two cores, nobody reading | {two:.0} | {one:.0} on one | {:.2} |", two / one);
}
