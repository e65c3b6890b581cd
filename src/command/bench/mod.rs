//! `broadcastd bench`: many devices against a server, some broadcasts, and what that took.

pub mod fleet;
pub mod herd;
pub mod server;

use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use uuid::Uuid;

use self::fleet::{Order, Plan, monotonic};
use self::herd::Herd;
use self::server::{Server, Usage};
use super::call::Caller;
use super::{SecretArgs, print_line, token};
use crate::api::nim::Call;

/// Open many devices against a server, send, and see how long everyone took to have it
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The broadcasts go out through the server API, so the app's limits hold: for more than 10 a minute use an app that may
send more (per_minute in [[apps]]).

Examples:
  # Against `broadcastd --dev standalone`
  broadcastd bench --devices 1000

  # Against a node and an api, with the node's CPU and memory from its admin address
  broadcastd bench --url ws://10.0.0.5:8091/ws --api http://10.0.0.6:8080 --admin http://10.0.0.5:9091 \\
      --app shop --secret-file shop.secret --devices 50000 --source 10.0.1.1,10.0.1.2")]
pub struct BenchArgs {
    /// Where devices connect
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    url: String,
    /// The server API's base address
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    api: String,
    /// The node's admin address, for its CPU and memory
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8081")]
    admin: String,
    /// The node's process id, if it runs here: finer than --admin
    #[arg(long)]
    pid: Option<u32>,
    /// The app's key
    #[arg(long, default_value = super::DEV_APP)]
    app: String,
    #[command(flatten)]
    secret: SecretArgs,
    /// How many devices
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    devices: u32,
    /// How many broadcasts, one at a time
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Then so many at once (0: none)
    #[arg(long, default_value_t = 0)]
    burst: u32,
    /// Bytes of each broadcast's body
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096))]
    bytes: u32,
    /// The most logins under way at once
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    at_once: u32,
    /// Addresses of this machine to connect from, in turn: one has room for some 28,000 connections to a server
    #[arg(long, value_delimiter = ',')]
    source: Vec<IpAddr>,
    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

/// Runs it and prints the figures.
///
/// # Errors
/// If the server cannot be reached, refuses, or a device does not get a broadcast.
pub async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    tokio::task::spawn_blocking(move || run_blocking(&args)).await.context("the benchmark failed")?
}

fn run_blocking(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let secret = args.secret.require(&args.app)?;
    let mut server = args.pid.map_or_else(|| Server::Metrics(args.admin.clone()), Server::Process);
    let before = match server.usage() {
        Ok(usage) => usage,
        Err(_) if args.pid.is_none() => {
            server = Server::Unknown;
            None
        }
        Err(error) => return Err(error),
    };
    let token = token::mint(&args.app, &secret, "bench", Duration::from_secs(86_400))?;
    let plan = plan(args, &token)?;
    let bar = progress_bar(u64::from(args.devices));
    let start = Instant::now();
    let program = std::env::current_exe().context("this program cannot be found")?;
    let mut herd = Herd::start(&program, &[], &plan, |online| bar.set_position(online as u64))?;
    let took = start.elapsed();
    bar.finish_and_clear();
    let after = server.usage()?;

    let caller = Caller { url: args.api.clone(), app: args.app.clone(), secret };
    let body = "x".repeat(args.bytes as usize);
    let mut result = json!({ "devices": args.devices, "login": logins(args, &herd, took, before, after) });
    let mut single = Figures::default();
    for _ in 0..args.rounds {
        single.round(&mut herd, &server, 1, || send(&caller, &body, 1))?;
    }
    if args.rounds > 0 {
        result["broadcast"] = single.json(args.devices);
    }
    if args.burst > 0 {
        let mut burst = Figures::default();
        burst.round(&mut herd, &server, args.burst, || send(&caller, &body, args.burst))?;
        result["burst"] = burst.json(args.devices);
    }
    if args.json {
        print_line(&result.to_string())?;
    } else {
        for line in sentences(args, &result) {
            print_line(&line)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn plan(args: &BenchArgs, token: &str) -> anyhow::Result<Plan> {
    let rest = args.url.strip_prefix("ws://").context("--url begins with ws:// (TLS is the balancer's work)")?;
    let (host, path) = rest.split_once('/').map_or((rest, "/ws".to_owned()), |(host, path)| (host, format!("/{path}")));
    let with_port = if host.rsplit(':').next().is_some_and(|port| port.parse::<u16>().is_ok()) {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let address: SocketAddr = with_port
        .to_socket_addrs()
        .with_context(|| format!("{with_port} cannot be resolved"))?
        .next()
        .with_context(|| format!("{with_port} has no address"))?;
    let login = json!({
        "type": "login", "app": args.app, "account": "bench", "device": "bench-{n}", "platform": "web", "token": token,
        // Not a new device: what is retained is not for it.
        "since": 1,
    });
    Ok(Plan {
        address,
        host: host.to_owned(),
        path,
        devices: args.devices as usize,
        first: 0,
        hello: vec![login.to_string()],
        greetings: 1,
        at_once: args.at_once as usize,
        sources: args.source.clone(),
    })
}

fn progress_bar(devices: u64) -> ProgressBar {
    let bar = ProgressBar::new(devices);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {human_pos} of {human_len} devices online, {elapsed}") {
        bar.set_style(style);
    }
    bar
}

fn send(caller: &Caller, body: &str, count: u32) -> anyhow::Result<()> {
    for _ in 0..count {
        let parameters = vec![("body", body.to_owned()), ("requestId", Uuid::now_v7().to_string())];
        let answer = caller.call_blocking(Call::Broadcast.path(), &parameters)?;
        anyhow::ensure!(answer["code"] == 200, "the server API answered {answer}");
    }
    Ok(())
}

/// What some rounds took.
#[derive(Debug, Default)]
pub struct Figures {
    rounds: u32,
    messages: u64,
    /// From sending to the first device, each device, and the last one, nanoseconds.
    first: Vec<u64>,
    each: Vec<u64>,
    last: Vec<u64>,
    /// The server's CPU time a delivery, nanoseconds.
    cpu: Vec<u64>,
}

impl Figures {
    /// One round: `send` sends `count` messages; everyone who reads gets them.
    ///
    /// # Errors
    /// If sending fails, or somebody does not get them.
    pub fn round(
        &mut self,
        herd: &mut Herd,
        server: &Server,
        count: u32,
        send: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        herd.order(Order::Expect(count))?;
        let before = server.usage()?;
        let start = monotonic();
        send()?;
        let (first, arrivals) = herd.arrived()?;
        // What the last delivery leaves to be done is part of it.
        std::thread::sleep(Duration::from_millis(5));
        let after = server.usage()?;
        let deliveries = arrivals.len() as u64 * u64::from(count);
        if let (Some(before), Some(after)) = (before, after) {
            self.cpu.push(nanos(after.cpu.saturating_sub(before.cpu)) / deliveries.max(1));
        }
        self.rounds += 1;
        self.messages = u64::from(count);
        self.first.push(first.saturating_sub(start));
        self.last.push(arrivals.last().copied().unwrap_or(start).saturating_sub(start));
        self.each.extend(arrivals.into_iter().map(|at| at.saturating_sub(start)));
        Ok(())
    }

    /// CPU per delivery, the median of the rounds, nanoseconds; `None` where the server's CPU could not be read.
    #[must_use]
    pub fn median_cpu(&self) -> Option<u64> {
        median(&self.cpu)
    }

    /// Until the last device had it, the median of the rounds, nanoseconds.
    #[must_use]
    pub fn median_last(&self) -> u64 {
        median(&self.last).unwrap_or(0)
    }

    fn percentile(&self, share: f64) -> u64 {
        percentile(&self.each, share)
    }

    fn json(&self, devices: u32) -> Value {
        json!({
            "rounds": self.rounds, "messages": self.messages, "devices": devices,
            "first_ms": millis(median(&self.first).unwrap_or(0)), "p50_ms": millis(self.percentile(0.5)),
            "p99_ms": millis(self.percentile(0.99)), "last_ms": millis(self.median_last()),
            "cpu_us_per_delivery": self.median_cpu().map(micros),
        })
    }
}

fn logins(args: &BenchArgs, herd: &Herd, took: Duration, before: Option<Usage>, after: Option<Usage>) -> Value {
    let each = u64::from(args.devices);
    let usage = before.zip(after);
    json!({
        "seconds": took.as_secs_f64(),
        "p50_ms": millis(percentile(&herd.logins, 0.5)), "p99_ms": millis(percentile(&herd.logins, 0.99)),
        "cpu_us": usage.map(|(before, after)| micros(nanos(after.cpu.saturating_sub(before.cpu)) / each)),
        "memory_bytes": usage.map(|(before, after)| after.memory.saturating_sub(before.memory) / each),
    })
}

/// The figures as sentences.
fn sentences(args: &BenchArgs, result: &Value) -> Vec<String> {
    let login = &result["login"];
    let mut lines = vec![format!(
        "{} devices online in {:.1} s; a login took {} ms (p50), {} ms (p99){}",
        args.devices,
        login["seconds"].as_f64().unwrap_or(0.0),
        login["p50_ms"],
        login["p99_ms"],
        if login["cpu_us"].is_null() {
            "; no CPU or memory: give --pid or --admin".to_owned()
        } else {
            format!(
                ", {} µs of the server's CPU and {} bytes of its memory each",
                login["cpu_us"], login["memory_bytes"]
            )
        }
    )];
    for (name, what) in [("broadcast", "one at a time"), ("burst", "at once")] {
        let figures = &result[name];
        if figures.is_null() {
            continue;
        }
        let count = if name == "burst" { &figures["messages"] } else { &figures["rounds"] };
        let cpu = match &figures["cpu_us_per_delivery"] {
            Value::Null => String::new(),
            cpu => format!("; {cpu} µs of the server's CPU a delivery"),
        };
        lines.push(format!(
            "{count} broadcasts {what}: first device {} ms, p50 {} ms, p99 {} ms, last {} ms{cpu}",
            figures["first_ms"], figures["p50_ms"], figures["p99_ms"], figures["last_ms"],
        ));
    }
    lines
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Of unsorted values.
fn percentile(values: &[u64], share: f64) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let index = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(0)
}

/// The middle one, in any unit; `None` of none.
#[must_use]
pub fn median(values: &[u64]) -> Option<u64> {
    (!values.is_empty()).then(|| percentile(values, 0.5))
}

/// With three digits behind the point.
#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn millis(nanos: u64) -> f64 {
    (nanos / 1000) as f64 / 1000.0
}

/// With two digits behind the point.
#[allow(clippy::cast_precision_loss, reason = "for reading")]
fn micros(nanos: u64) -> f64 {
    (nanos / 10) as f64 / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_taken_from_what_was_measured() {
        let values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.99), percentile(&values, 1.0)), (51, 100, 100));
        assert_eq!((percentile(&[], 0.5), median(&[])), (0, None));
    }
}
