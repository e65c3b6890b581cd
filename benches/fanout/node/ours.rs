//! Our node: the release binary's `node` role on a Redis of its own; requests go to the ledger as a worker's would.

use std::sync::Arc;
use std::time::Duration;

use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{RawRequest, Request, Submission};
use broadcastd::command::bench::fleet::Plan;
use broadcastd::command::bench::herd::Herd;
use broadcastd::command::bench::server::Server;
use broadcastd::command::token;
use broadcastd::ledger::Ledger;
use broadcastd::ledger::redis::RedisLedger;

use super::subject::{BYTES, Running, Subject, on_cpu, plain};
use crate::growth;
use crate::support::broadcastd::{App, Process};
use crate::support::redis::Redis;
use crate::support::stack::Stack;

/// What must stay while it runs.
#[allow(dead_code, reason = "held for its end")]
pub struct Ours {
    redis: Redis,
    pub node: Process,
}

impl Ours {
    /// How many commands Redis has carried out.
    pub fn commands(&self) -> u64 {
        let stats = self.redis.command(&["INFO", "stats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix("total_commands_processed:"));
        line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }
}

/// What differs between the cases.
pub struct Case {
    pub devices: usize,
    pub shards: usize,
    /// The cores of the node.
    pub cpus: &'static str,
    /// So many broadcasts of 1 KiB are retained before anybody comes.
    pub retained: u32,
    /// Of the node; 0: the system's choice.
    pub send_buffer_bytes: u32,
    /// Connections that it accepts.
    pub accept_per_second: u32,
}

impl Case {
    pub fn new(devices: usize) -> Self {
        Self { devices, shards: 1, cpus: "0", retained: 0, send_buffer_bytes: 0, accept_per_second: 1_000_000 }
    }
}

/// Starts it.
pub async fn start(case: Case) -> Subject {
    let redis = Redis::dedicated(&[]);
    let app = App::unlimited();
    let stack = Stack::on("amqp://127.0.0.1:1", &redis.url(), std::slice::from_ref(&app));
    let node = stack
        .role("node")
        .with("log.level", "warn")
        .with("node.shards", case.shards.to_string())
        .with("node.accept_per_second", case.accept_per_second.to_string())
        .with("node.send_buffer_bytes", case.send_buffer_bytes.to_string())
        // What is measured is not to be mixed with pings.
        .with("node.ping_seconds", "600")
        .start()
        .await;
    pin(node.pid(), case.cpus);
    pin_shards(node.pid(), case.cpus);
    let ledger = ledger(&redis, &stack).await;
    for _ in 0..case.retained {
        accept(&ledger, &app, 1, 1024 - 96, true).await;
    }
    let plan = Plan { greetings: 1 + case.retained, ..plan(&app, node.public_port(), case.devices) };
    let runtime = tokio::runtime::Handle::current();
    let send = Box::new(move |count| {
        let (ledger, app) = (ledger.clone(), app.clone());
        // The message around the body is 95 bytes.
        runtime.block_on(async move { accept(&ledger, &app, count, BYTES - 95, false).await });
    });
    let server = Server::Process(node.pid());
    Subject {
        name: "broadcastd".to_owned(),
        server,
        plan,
        send,
        running: Running::Ours(Box::new(Ours { redis, node })),
    }
}

/// Puts a process, with all its threads, on these cores.
pub fn pin(pid: u32, cpus: &str) {
    let status = std::process::Command::new("taskset")
        .args(["-a", "-p", "-c", cpus, &pid.to_string()])
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "process {pid} cannot be put on core {cpus}");
}

/// Gives each shard a core of its own: `cpus` are as many.
fn pin_shards(pid: u32, cpus: &str) {
    for (shard, cpu) in cpus.split(',').enumerate() {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
        let is_shard = |task: &std::path::PathBuf| {
            std::fs::read_to_string(task.join("comm")).unwrap().trim() == format!("shard-{shard}")
        };
        let thread = threads.into_iter().find(is_shard).expect("a thread of this name");
        let id = thread.file_name().unwrap().to_str().unwrap();
        let status = std::process::Command::new("taskset")
            .args(["-p", "-c", cpu, id])
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.is_ok_and(|status| status.success()), "shard {shard} cannot be put on core {cpu}");
    }
}

pub async fn ledger(redis: &Redis, stack: &Stack) -> Arc<RedisLedger> {
    let ledger = growth::ledger(&redis.url(), &stack.prefix);
    ledger.health().wait_for(Result::is_ok).await.unwrap();
    Arc::new(ledger)
}

pub async fn accept(ledger: &RedisLedger, app: &App, count: u32, bytes: usize, retained: bool) {
    let batch: Vec<Submission> = (0..count)
        .map(|_| {
            let raw = RawRequest {
                request_id: Some(uuid::Uuid::new_v4().to_string()),
                app_key: Some(app.key.clone()),
                from: Some("ops".to_owned()),
                body: Some("x".repeat(bytes)),
                is_offline: Some(retained),
                ..RawRequest::default()
            };
            let request = Request::from_raw(raw, None).unwrap();
            Submission { request, limits: Limits { per_minute: 1_000_000, per_day: 10_000_000 } }
        })
        .collect();
    for decision in ledger.accept(&batch).await {
        decision.unwrap();
    }
}

/// Devices of an app that log in.
pub fn plan(app: &App, port: u16, devices: usize) -> Plan {
    let token = token::mint(&app.key, &app.secret.clone().into(), "bench", Duration::from_secs(86_400)).unwrap();
    let login = serde_json::json!({
        "type": "login", "app": app.key, "account": "bench", "device": "bench-{n}", "platform": "web", "token": token,
        "since": 0,
    });
    Plan { hello: vec![login.to_string()], greetings: 1, ..plain(port, "/ws", devices) }
}

/// Has them log in, from the second core.
pub fn herd_on(plan: &Plan) -> Herd {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_broadcastd"));
    Herd::start(program, &on_cpu("1"), plan, |_| {}).unwrap()
}
