//! Processes whose clocks are wrong: everything that counts is measured by Redis' clock.

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::sender::{Amqp, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

const HOUR: i64 = 3600;
/// The tokens that devices present hold for an hour, by the node's clock.
const ALMOST_AN_HOUR: i64 = HOUR - 60;

/// The seconds between the clock of a process, by the lines that it logs, and the right one.
fn seconds_off(process: &Process) -> i64 {
    let output = process.output();
    let line = output.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no JSON in {output}"));
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    let time = line["timestamp"].as_str().unwrap();
    let date = std::process::Command::new("date").args(["-u", "-d", time, "+%s"]).output().unwrap();
    let seconds: i64 = String::from_utf8(date.stdout).unwrap().trim().parse().unwrap();
    seconds - i64::try_from(now_ms() / 1000).unwrap()
}

async fn accepted_by(worker: &Process) -> f64 {
    worker.metric("broadcastd_accepted_total").await
}

/// Row 35: one worker an hour ahead and one an hour behind share the queue; two nodes likewise.
#[tokio::test]
async fn limits_and_expiry_follow_redis_whatever_the_others_clocks_say() {
    let app = App { per_minute: 30, ..App::unlimited() };
    let free = App::unlimited();
    let stack = Stack::new(&[app.clone(), free.clone()]);
    let role = |role: &str, off: i64| {
        // One at a time: both workers get their share.
        stack.role(role).with("amqp.prefetch", "1").with("log.format", "json").clock_off(off)
    };
    let (fast, slow, fast_node, slow_node) = tokio::join!(
        role("worker", HOUR).start(),
        role("worker", -HOUR).start(),
        role("node", ALMOST_AN_HOUR).start(),
        role("node", -HOUR).start(),
    );
    for (process, off) in [(&fast, HOUR), (&slow, -HOUR), (&fast_node, ALMOST_AN_HOUR), (&slow_node, -HOUR)] {
        assert!((seconds_off(process) - off).abs() < 60, "{} s off", seconds_off(process));
    }
    let amqp = stack.amqp().await;
    let urls = [fast_node.device_url(), slow_node.device_url()];
    let mut fast_device = Device::online(&app, "web", &urls[0]).await;
    let mut slow_device = Device::online(&app, "web", &urls[1]).await;

    // The limit: 30 of 60, whichever worker decides, and the hint is by Redis' clock.
    let requests: Vec<_> = (0..60).map(|number| request(&app, &format!("number {number}"))).collect();
    let replies = amqp.burst(&requests).await;
    let mut checker = Checker::default();
    for (request, reply) in requests.iter().zip(&replies) {
        checker.verdict(request, reply).unwrap();
        match reply["code"].as_u64() {
            Some(200) => near_now(reply["msg"]["createTime"].as_u64().unwrap()),
            Some(416) => assert!((1..=61).contains(&reply["retryAfter"].as_u64().unwrap()), "{reply}"),
            _ => panic!("{reply}"),
        }
    }
    assert_eq!(checker.accepted(), 30);
    let (by_fast, by_slow) = (accepted_by(&fast).await, accepted_by(&slow).await);
    assert!(by_fast > 0.0 && by_slow > 0.0, "{by_fast} and {by_slow}: both had a share");
    for device in [&mut fast_device, &mut slow_device] {
        device.collect(30, SOON).await;
        checker.device(device.history(), Must::Everything, 0).unwrap();
        near_now(device.history()[0].time_ms);
    }
    // Asked again, whoever answers: the same verdicts.
    let accepted: Vec<_> = requests.iter().zip(&replies).filter(|(_, reply)| reply["code"] == 200).collect();
    for (request, reply) in accepted {
        assert_eq!(amqp.request(request).await, *reply);
    }

    expiry(&amqp, &free, &urls).await;
    after_row(&stack).await;
}

fn near_now(time_ms: u64) {
    // The first ids of an app are a minute ahead, its times are not.
    assert!(now_ms().abs_diff(time_ms) < 30_000, "{time_ms} is not now");
}

/// What holds for half an hour must not be expired for the node that is ahead; what has expired must be, for the one that is
/// behind. Both come from both workers.
async fn expiry(amqp: &Amqp, app: &App, urls: &[String; 2]) {
    let mut checker = Checker::default();
    let mut brief_until = 0;
    for number in 0..20 {
        for (name, seconds) in [("brief", 3), ("long", 1800)] {
            let mut request = retained(app, &format!("{name} {number}"));
            request["ttlSeconds"] = seconds.into();
            let reply = amqp.request(&request).await;
            checker.verdict(&request, &reply).unwrap();
            let (created, expires) = (reply["msg"]["createTime"].as_u64(), reply["msg"]["expireTime"].as_u64());
            assert_eq!(expires.unwrap() - created.unwrap(), seconds * 1000, "{reply}");
            near_now(created.unwrap());
            if seconds == 3 {
                brief_until = expires.unwrap();
            }
        }
    }
    let expired = async || if now_ms() > brief_until { Ok(()) } else { Err("still valid") };
    until("expired", SOON, expired).await;
    for url in urls {
        let joined_ms = now_ms();
        let mut device = Device::online(app, "web", url).await;
        let head = device.head();
        device.collect(20, SOON).await;
        amqp.accepted(&request(app, "end")).await;
        assert_eq!(device.contents_up_to("end").await, ["end"]);
        checker.device(&device.history()[..20], Must::RetainedUpTo(head), joined_ms).unwrap();
    }
}
