//! One broadcast to every device: our node, a bare send loop and each peer that is installed, in one run.
//!
//! It runs in a network namespace of its own, where what the loopback device receives is worked off on the second core: the
//! sender, on the first one, is not charged for the receiver. Without that right everyone is charged more, and the table says so.

pub mod floor;
pub mod ours;
mod subject;

use std::io::{BufRead, BufReader, Lines};
use std::net::IpAddr;
use std::process::{ChildStdout, Command};
use std::time::Duration;

use broadcastd::command::bench::fleet::{Order, Plan};
use broadcastd::command::bench::herd::Herd;
use broadcastd::command::bench::server::{Server, Usage};
use broadcastd::command::bench::{Figures, median};
use tokio::runtime::Runtime;

use self::ours::Case;
use self::subject::{Running, Subject};

const DEVICES: usize = 10_000;
const ROUNDS: u32 = 15;
const BURST: u32 = 20;
/// Connections that a node accepts a second, as by default.
const ACCEPTS: u32 = 5000;
const INSIDE: &str = "BROADCASTD_BENCH_NAMESPACE";
/// The cores, as bits, that work off what the loopback device receives.
const RECEIVERS: &str = "/sys/class/net/lo/queues/rx-0/rps_cpus";

/// `peers [DEVICES [SERVER…]]`: only the comparison; `cases [DEVICES [CASE…]]`: only our own cases; nothing: both.
pub fn run(runtime: &Runtime, arguments: &[String]) {
    if !enter("node", arguments) {
        return;
    }
    let which = arguments.first().map_or("", String::as_str);
    let devices = arguments.get(1).map_or(DEVICES, |devices| devices.parse().unwrap());
    println!("## Node: {devices} devices on one core, {} bytes a message\n", subject::BYTES);
    if which != "cases" {
        compare(runtime, devices, arguments.get(2..).unwrap_or_default());
    }
    if which != "peers" {
        cases(runtime, devices, arguments.get(2..).unwrap_or_default());
    }
}

/// Sees to it that the benchmark `what` runs in a namespace of its own, if that is allowed; `false` if it has been run there, by
/// this program once more, and nothing is left to do. In there everything but the servers runs on the second core.
pub fn enter(what: &str, arguments: &[String]) -> bool {
    const SCRIPT: &str = "mount -t sysfs sysfs /sys && ip link set lo up && \
        echo 2 > /sys/class/net/lo/queues/rx-0/rps_cpus && exec env BROADCASTD_BENCH_NAMESPACE=isolated \"$@\"";
    if std::env::var_os(INSIDE).is_some() {
        pin_self();
        return true;
    }
    let allowed = Command::new("unshare").args(["-n", "-m", "true"]).status().is_ok_and(|status| status.success());
    if !allowed || std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        pin_self();
        println!("No right to a network namespace: the senders are charged for the receivers' work too.\n");
        return true;
    }
    // The system keeps 1000 received packets a core and drops the others: a sender that is faster than the receivers would be
    // measured by TCP's retransmissions, 200 ms later.
    let backlog = Backlog::raise();
    let program = std::env::current_exe().unwrap();
    let status = Command::new("unshare")
        .args(["-n", "-m", "sh", "-c", SCRIPT, "sh"])
        .arg(program)
        .arg(what)
        .args(arguments)
        .status()
        .unwrap();
    drop(backlog);
    assert!(status.success(), "the benchmark {what} failed");
    false
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
pub struct Online {
    /// Before the server, which they would miss.
    pub herd: Herd,
    pub subject: Subject,
    pub login: Usage,
}

pub fn connect(subject: Subject) -> Online {
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

pub fn round(online: &mut Online, figures: &mut Figures, count: u32) {
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

/// A server with its devices, and what its rounds were.
struct Lane {
    online: Online,
    single: Figures,
    burst: Figures,
}

/// All of them with their devices online at once, a round of each in turn: what drifts on the machine drifts for all.
/// `only`: the names to compare, all of them if empty.
fn compare(runtime: &Runtime, devices: usize, only: &[String]) {
    type Start<'a> = Box<dyn FnOnce() -> Option<Subject> + 'a>;
    let subjects: Vec<(&str, Start<'_>)> = vec![
        ("send loop", Box::new(|| Some(subject::floor(devices, (0, 0))))),
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
    let (mut lanes, mut absent) = (Vec::new(), Vec::new());
    for (index, (name, start)) in subjects.into_iter().enumerate() {
        // The send loop is what the others are compared with.
        if index > 0 && !only.is_empty() && !only.iter().any(|only| only == name) {
            continue;
        }
        match start() {
            Some(mut subject) => {
                // All devices are there at once, and one address has ports for 28,000.
                subject.plan.sources = vec![IpAddr::from([127, 0, 1, 1 + u8::try_from(index).unwrap()])];
                lanes.push(Lane { online: connect(subject), single: Figures::default(), burst: Figures::default() });
            }
            None => absent.push(name),
        }
    }
    // The first round warms up.
    lanes.iter_mut().for_each(|Lane { online, .. }| round(online, &mut Figures::default(), 1));
    for _ in 0..ROUNDS {
        lanes.iter_mut().for_each(|Lane { online, single, .. }| round(online, single, 1));
    }
    for _ in 0..ROUNDS {
        lanes.iter_mut().for_each(|Lane { online, burst, .. }| round(online, burst, BURST));
    }
    println!(
        "| server | CPU a delivery | ÷ send loop | {BURST} at once, CPU a delivery | time to the last | ÷ send loop | \
         memory a session | connecting, CPU each |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let floor = &lanes[0].single;
    for Lane { online, single, burst } in &lanes {
        let cpu = |figures: &Figures| figures.median_cpu().unwrap_or(0);
        println!(
            "| {} | {:.2} µs | {:.2} | {:.2} µs | {:.0} ms | {:.2} | {:.2} KiB | {:.0} µs |",
            online.subject.name,
            micros(cpu(single)),
            ratio(cpu(single), cpu(floor)),
            micros(cpu(burst)),
            micros(single.median_last()) / 1000.0,
            ratio(single.median_last(), floor.median_last()),
            each(Duration::from_micros(online.login.memory), devices) / 1024.0,
            each(online.login.cpu, devices),
        );
    }
    println!(
        "\nMedians of {ROUNDS} rounds, a round of each server in turn. {BURST} at once are one batch through Redis for broadcastd, a line \
         on standard input for those in JavaScript, one HTTP call after the other for nchan and Centrifugo."
    );
    if !absent.is_empty() {
        println!("Not installed, so not measured: {}.", absent.join(", "));
    }
    println!();
}

/// What only our node has to show. `only`: the cases, all of them if empty.
fn cases(runtime: &Runtime, devices: usize, only: &[String]) {
    println!("| case | broadcastd | beside it | ratio |\n|---|---|---|---|");
    for (name, case) in
        [("retained", retained as fn(&Runtime, usize)), ("stalled", stalled), ("cores", cores), ("storm", storm)]
    {
        if only.is_empty() || only.iter().any(|only| only == name) {
            case(runtime, devices);
        }
    }
    println!();
}

/// A login that is given 100 broadcasts of 1 KiB: what that costs above one without, against the CPU that the kernel takes to
/// send as many bytes from a buffer to who has just connected, by the clock of the thread that does. A tenth of the devices come to each server
/// in turn, and leave: the machine drifts.
fn retained(runtime: &Runtime, devices: usize) {
    const GIVEN: u32 = 100;
    const BYTES: usize = 1024;
    let devices = devices / 10;
    let ours = |retained| runtime.block_on(ours::start(Case { retained, ..Case::new(devices) }));
    let (mut floor, output) = subject::floor_on("0", devices, (GIVEN as usize, BYTES));
    let mut output = BufReader::new(output).lines();
    let subjects = [ours(GIVEN), ours(0)];
    let mut costs: [Vec<u64>; 3] = Default::default();
    // The first turn warms up.
    for turn in 0..=ROUNDS {
        let mut spent = [0; 3];
        for (subject, spent) in subjects.iter().zip(&mut spent) {
            let before = settled(&subject.server);
            let herd = ours::herd_on(&subject.plan);
            *spent = u64::try_from(settled(&subject.server).cpu.saturating_sub(before.cpu).as_nanos()).unwrap();
            drop(herd);
        }
        let herd = ours::herd_on(&floor.plan);
        // It prints what the greetings since the last time took.
        (floor.send)(0);
        spent[2] = output.next().unwrap().unwrap().parse().unwrap();
        drop(herd);
        if turn > 0 {
            costs.iter_mut().zip(spent).for_each(|(costs, spent)| costs.push(spent / devices as u64));
        }
    }
    let above: Vec<u64> = costs[0].iter().zip(&costs[1]).map(|(with, without)| with.saturating_sub(*without)).collect();
    let mine = median(&above).unwrap();
    let [with, without, kernel] = costs.map(|costs| median(&costs).unwrap());
    println!(
        "| login with {GIVEN} retained of 1 KiB: CPU above one without ({:.0} and {:.0} µs) | {:.0} µs | {:.0} µs in the kernel to \
         send as many bytes from a buffer | {:.2} |",
        micros(with),
        micros(without),
        micros(mine),
        micros(kernel),
        ratio(mine, kernel)
    );
}

/// A tenth of the devices stops reading: beside a node that has the others only.
fn stalled(runtime: &Runtime, devices: usize) {
    let silent = devices / 10;
    let start = |devices| {
        // Small buffers of the kernel's are full soon.
        let case = Case { send_buffer_bytes: 8192, ..Case::new(devices) };
        connect(runtime.block_on(ours::start(case)))
    };
    let (mut with, mut without) = (start(devices), start(devices - silent));
    with.herd.order(Order::Stall(silent)).unwrap();
    let before = [&with, &without].map(|online| settled(&online.subject.server).memory);
    let behind = |online: &Online| runtime.block_on(online.subject.metric("broadcastd_sessions_behind"));
    // Until all of their sockets are full, and they are a cursor. Less than the node's window: nobody is sent away.
    let mut sent = 0;
    #[allow(clippy::cast_precision_loss, reason = "devices")]
    while behind(&with) < silent as f64 {
        assert!(sent < 900, "only {} of {silent} are behind after {sent} broadcasts", behind(&with));
        for online in [&mut with, &mut without] {
            round(online, &mut Figures::default(), 50);
        }
        sent += 50;
    }
    let (mut slow, mut plain) = (Figures::default(), Figures::default());
    for _ in 0..ROUNDS {
        round(&mut with, &mut slow, 1);
        round(&mut without, &mut plain, 1);
    }
    let after = [&with, &without].map(|online| settled(&online.subject.server).memory);
    let grown = [0, 1].map(|index| after[index].saturating_sub(before[index]));
    #[allow(clippy::cast_possible_truncation, reason = "devices")]
    let still = behind(&with) as usize;
    println!(
        "| {silent} of {devices} do not read (send buffers of 8 KiB): the others' time to the last | {:.0} ms | {:.0} ms without the {silent} | {:.2} |",
        micros(slow.median_last()) / 1000.0,
        micros(plain.median_last()) / 1000.0,
        ratio(slow.median_last(), plain.median_last())
    );
    println!(
        "| … memory that {} broadcasts add to the node, a device that does not read ({still}, none sent away) | {} KiB | {} KiB \
         without them | {} bytes |",
        sent + ROUNDS,
        grown[0] / 1024,
        grown[1] / 1024,
        (grown[0] as i64 - grown[1] as i64) / silent as i64
    );
}

/// Waits until the server does nothing any more.
fn until_idle(server: &Server) {
    let cpu = || server.usage().unwrap().unwrap().cpu;
    let mut used = cpu();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = cpu();
        if now.saturating_sub(used) < Duration::from_micros(500) {
            return;
        }
        used = now;
    }
}

/// One core and two, while nobody reads: the devices' side would need cores of its own. What the kernel does to receive is
/// done on the core that sends, on two cores as on one. All of them are online at once, and take turns: what the machine gives
/// to two cores drifts, and the send loops' share of it says how much it is.
fn cores(runtime: &Runtime, devices: usize) {
    const TURNS: u32 = 2 * ROUNDS;
    let _ = std::fs::write(RECEIVERS, "0");
    let node = |shards: usize, cpus: &'static str, source: u8| {
        let mut subject = runtime.block_on(ours::start(Case { shards, cpus, ..Case::new(devices) }));
        subject.plan.sources = vec![IpAddr::from([127, 0, 1, source])];
        let mut online = connect(subject);
        round(&mut online, &mut Figures::default(), 1);
        online.herd.order(Order::Stall(devices)).unwrap();
        online
    };
    let mut nodes = [node(1, "0", 1), node(2, "0,1", 2)];
    let mut loops = [loops(&["0"], devices, 3), loops(&["0", "1"], devices, 4)];
    let mut took: [Vec<u64>; 4] = Default::default();
    for _ in 0..TURNS {
        for (index, online) in nodes.iter_mut().enumerate() {
            // From its acceptance until the last shard is done with it.
            let subject = &mut online.subject;
            let seconds = |subject: &Subject| runtime.block_on(subject.metric("broadcastd_delivery_seconds_sum"));
            let before = seconds(subject);
            (subject.send)(1);
            until_idle(&subject.server);
            let spent = Duration::from_secs_f64(seconds(subject) - before);
            took[index].push(u64::try_from(spent.as_nanos()).unwrap());
        }
        for (index, lanes) in loops.iter_mut().enumerate() {
            lanes.iter_mut().for_each(|(online, _)| (online.subject.send)(1));
            // The slower one's.
            let nanos = lanes.iter_mut().map(|(_, output)| output.next().unwrap().unwrap().parse::<u64>().unwrap());
            took[2 + index].push(nanos.max().unwrap());
        }
    }
    #[allow(clippy::cast_precision_loss, reason = "for reading")]
    let [one, two, one_loop, two_loops] = took.map(|nanos| devices as f64 * 1e9 / median(&nanos).unwrap() as f64);
    println!("| deliveries a second on two cores, nobody reading | {two:.0} | {one:.0} on one | {:.2} |", two / one);
    println!(
        "| … of the bare send loop, a process a core, in turn | {two_loops:.0} | {one_loop:.0} on one | {:.2} |",
        two_loops / one_loop
    );
    let _ = std::fs::write(RECEIVERS, "2");
}

/// A send loop with its devices, and what it prints.
type Loop = (Online, Lines<BufReader<ChildStdout>>);

/// Send loops, one on each of these cores, with the devices dealt among them; none of those reads.
fn loops(cpus: &[&str], devices: usize, source: u8) -> Vec<Loop> {
    let start = |cpu: &&str| {
        let (mut subject, output) = subject::floor_on(cpu, devices / cpus.len(), (0, 0));
        subject.plan.sources = vec![IpAddr::from([127, 0, 1, source])];
        let mut online = connect(subject);
        online.herd.order(Order::Stall(devices)).unwrap();
        (online, BufReader::new(output).lines())
    };
    cpus.iter().map(start).collect()
}

/// All devices come at once, as after their node was killed, at a node that serves the app already.
fn storm(runtime: &Runtime, devices: usize) {
    let subject = runtime.block_on(ours::start(Case { accept_per_second: ACCEPTS, ..Case::new(devices) }));
    let first = Plan { devices: 1, ..subject.plan.clone() };
    let first = ours::herd_on(&first);
    let commands = || match &subject.running {
        Running::Ours(ours) => ours.commands(),
        Running::Child(_) => unreachable!("it is our node"),
    };
    let (start, before) = (std::time::Instant::now(), commands());
    let herd = ours::herd_on(&Plan { at_once: devices, ..subject.plan.clone() });
    let (took, asked) = (start.elapsed(), commands() - before);
    let slowest = herd.logins.last().copied().unwrap_or(0);
    println!(
        "| {devices} devices log in at once, {ACCEPTS} accepted a second: until the last is in | {:.1} s | {asked} commands that Redis \
         carried out meanwhile (leases, probes) | the slowest login {:.1} s |",
        took.as_secs_f64(),
        micros(slowest) / 1e6
    );
    drop((first, herd));
}
