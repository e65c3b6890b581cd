//! How the cost of one acceptance grows with what is stored: one call at a time, the cases in turn.

use std::time::{Duration, Instant};

use broadcastd::broadcast::quota::Limits;
use broadcastd::broadcast::request::{RawRequest, Request, Submission};
use broadcastd::ledger::redis::{Mode, RedisLedger, RedisSettings};
use broadcastd::ledger::{Ledger, LedgerSettings};

use crate::machine::{percentile, show};
use crate::support::redis::Redis;

const ROUNDS: usize = 40;
const CALLS: usize = 50;

struct Case {
    name: &'static str,
    apps: usize,
    nodes: usize,
    retained: bool,
    times: Vec<Duration>,
}

pub async fn run() {
    let redis = Redis::dedicated(&[]);
    let prefix = Redis::prefix();
    let ledger = ledger(&redis.url(), &prefix);
    ledger.health().wait_for(Result::is_ok).await.unwrap();
    let case = |name, apps, nodes, retained| Case { name, apps, nodes, retained, times: Vec::new() };
    let mut cases = [
        case("1 app, 1 node, 0 retained", 1, 1, false),
        case("1 app, 1 node, 100 retained (each acceptance retained too)", 1, 1, true),
        case("1000 apps, 1 node, 0 retained", 1000, 1, false),
        case("1 app, 100 nodes, 0 retained", 1, 100, false),
        case("1 app, 1000 nodes, 0 retained", 1, 1000, false),
    ];
    for (number, case) in cases.iter().enumerate() {
        for app in 0..case.apps {
            for some in (0..case.nodes).collect::<Vec<_>>().chunks(500) {
                let key = format!("{prefix}{{c{number}-{app}}}:nodes");
                let mut command = vec!["ZADD".to_owned(), key];
                some.iter().for_each(|node| command.extend(["9999999999999".to_owned(), format!("n{node}")]));
                redis.command(&command.iter().map(String::as_str).collect::<Vec<_>>());
            }
        }
    }
    let mut next = 0_u64;
    for round in 0..=ROUNDS {
        for (number, case) in cases.iter_mut().enumerate() {
            for call in 0..if round == 0 { 150 } else { CALLS } {
                next += 1;
                let submission = submission(format!("c{number}-{}", call * 37 % case.apps), next, case.retained);
                let start = Instant::now();
                let decision = ledger.accept(std::slice::from_ref(&submission)).await.remove(0).unwrap();
                let elapsed = start.elapsed();
                assert!(matches!(decision, broadcastd::broadcast::verdict::Decision::Accepted(_)));
                // The first round fills: 100 retained, every app's keys.
                if round > 0 {
                    case.times.push(elapsed);
                }
            }
        }
    }
    println!("## Acceptance: one call at a time, worker to Redis and back, {} calls each\n", ROUNDS * CALLS);
    println!("| stored | p50 | p99 |\n|---|---|---|");
    for case in &mut cases {
        case.times.sort();
        println!(
            "| {} | {} | {} |",
            case.name,
            show(percentile(&case.times, 0.5)),
            show(percentile(&case.times, 0.99))
        );
    }
    println!();
}

/// A ledger on this server.
pub fn ledger(url: &str, prefix: &str) -> RedisLedger {
    let settings = RedisSettings {
        url: url.to_owned().into(),
        url_file: String::new(),
        mode: Mode::Single,
        sentinel_service: String::new(),
        sentinel_username: String::new(),
        sentinel_password: String::new().into(),
        sentinel_password_file: String::new(),
        key_prefix: prefix.to_owned(),
        ca_file: String::new(),
        client_certificate_file: String::new(),
        client_key_file: String::new(),
        connect_timeout_ms: 2000,
        response_timeout_ms: 5000,
        test_clock_key: None,
    };
    RedisLedger::start(settings, LedgerSettings { log_length: 1000, log_hours: 168 })
}

fn submission(app: String, number: u64, retained: bool) -> Submission {
    let raw = RawRequest {
        request_id: Some(number.to_string()),
        app_key: Some(app),
        from: Some("ops".to_owned()),
        body: Some("Maintenance tonight from 22:00 to 23:00 UTC. Please save your work.".to_owned()),
        is_offline: Some(retained),
        ..RawRequest::default()
    };
    let request = Request::from_raw(raw, None).unwrap();
    Submission { request, limits: Limits { per_minute: u32::MAX, per_day: u32::MAX } }
}
