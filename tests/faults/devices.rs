//! Thousands of devices: killed and drained nodes, devices that stop reading (rows 27, 28, 29).

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::after_row::after_row;
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::fleet::{Afterwards, Fleet, STORM};
use crate::support::sender::{Amqp, request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

/// Sends requests in small groups, each after the verdicts of the one before, until `is_over`. Every third is retained.
async fn load(amqp: &Amqp, app: &App, checker: &mut Checker, mut is_over: impl FnMut(usize) -> bool) -> usize {
    let mut sent = 0;
    while !is_over(sent) {
        let requests: Vec<Value> = (sent..sent + 5)
            .map(|number| if number % 3 == 0 { retained(app, "kept") } else { request(app, "for who is online") })
            .collect();
        let replies = amqp.burst(&requests).await;
        checker.all_accepted(&requests, &replies);
        sent += requests.len();
    }
    sent
}

/// Row 27: the node dies when 300 of 1,000 devices have had a broadcast and the others have not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_devices_of_a_node_killed_mid_sweep_go_on_elsewhere() {
    const DEVICES: usize = 1000;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // One broadcast reaches all; the second one 300.
    let points = format!("node::mid-sweep={}*off->1*return(kill)", DEVICES + 299);
    let doomed = async { stack.role("node").failpoints(&points).start().await };
    let (_worker, mut doomed, other) = tokio::join!(stack.worker(), doomed, stack.node());
    let amqp = stack.amqp().await;
    let mut fleet = Fleet::new(&app, DEVICES);
    fleet.launch(&[doomed.device_url(), other.device_url()], Afterwards::Return);
    fleet.until_online(STORM).await;

    let mut checker = Checker::default();
    let first = request(&app, "to all");
    checker.all_accepted(std::slice::from_ref(&first), &amqp.burst(std::slice::from_ref(&first)).await);
    fleet.until_each_had(1, SOON).await;
    let sent = 1 + load(&amqp, &app, &mut checker, |sent| sent >= 60).await;
    assert_eq!(doomed.wait(SOON).await.signal(), Some(9), "the node was not killed");
    fleet.until_each_had(sent, STORM).await;
    fleet.check(&checker, |_| Must::Everything);

    let records = fleet.records();
    let mut had: Vec<usize> = records.iter().map(|record| record.ends[0].had).collect();
    had.sort_unstable();
    println!(
        "row 27: when the node died {} devices had 1 broadcast and {} had more; all {sent} arrived at each once, {} logins",
        had.iter().filter(|&&had| had == 1).count(),
        had.iter().filter(|&&had| had > 1).count(),
        records.iter().map(|record| record.logins).sum::<usize>()
    );
    assert!(had[0] == 1 && had[DEVICES - 1] > 1, "not in the middle of a sweep: {had:?}");
    assert!(records.iter().all(|record| record.logins == 2 && record.ends[0].code.is_none()));
    after_row(&stack).await;
}

/// Row 28: under load; the devices are told to go one after the other, and when to come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_of_a_drained_node_leave_spread_over_the_window_and_miss_nothing() {
    const DEVICES: usize = 1000;
    // The last fifth of the window of 5 s is for their answers.
    const SPREAD: u64 = 5000 * 4 / 5;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // Slowly, and without a line for each device: a busy machine must not spread by itself what is sent at once.
    let drained = async {
        let node = stack.role("node").with("log.level", "info");
        node.with("drain.leaves_per_second", "200").start().await
    };
    // Devices wait for up to 5 s before they come back. What is sent meanwhile is more than the usual window on a fast machine,
    // and who comes back after more than the window is promised no more than that.
    let other = async { stack.role("node").with("node.recent_frames", "100000").start().await };
    let (_worker, mut drained, other) = tokio::join!(stack.worker(), drained, other);
    let amqp = stack.amqp().await;
    let mut fleet = Fleet::new(&app, DEVICES);
    fleet.launch(&[drained.device_url(), other.device_url()], Afterwards::Return);
    fleet.until_online(STORM).await;

    let mut checker = Checker::default();
    let deadline = Instant::now() + STORM;
    let mut told = None;
    let sent = load(&amqp, &app, &mut checker, |sent| {
        if sent == 10 {
            drained.term();
            told = Some(now_ms());
        }
        assert!(Instant::now() < deadline, "they do not come back");
        sent > 30 && fleet.count(|record| record.logins == 2) == DEVICES
    })
    .await;
    assert!(drained.wait(SOON).await.success());
    let records = fleet.records();
    let told = told.unwrap();
    let mut tenths = [0usize; 10];
    for record in &records {
        let end = record.ends[0];
        assert_eq!(end.code, Some(1012));
        assert!(end.reconnect_after_ms.is_some_and(|wait| (100..=60_000).contains(&wait)), "{end:?}");
        let tenth = usize::try_from(end.at_ms.saturating_sub(told) * 10 / SPREAD).unwrap();
        tenths[tenth.min(9)] += 1;
    }
    println!("row 28: {sent} broadcasts meanwhile; devices told to go in each tenth of {SPREAD} ms: {tenths:?}");
    // A tenth of them each, on a quiet machine; all of them in the first one or two, if they were sent away at once.
    let some = tenths.iter().filter(|&&left| left > 0).count();
    assert!(some >= 5 && tenths.iter().all(|&left| left <= DEVICES / 2), "not spread: {tenths:?}");
    assert_eq!(other.metric("broadcastd_resumes_short_total").await, 0.0);
    fleet.until_each_had(sent, STORM).await;
    fleet.check(&checker, |_| Must::Everything);
    after_row(&stack).await;
}

/// The node's resident memory, KiB.
fn resident(node: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends broadcasts of 4,000 characters one after the other; the median of the milliseconds until the last of `readers` has it.
async fn time_to_last(amqp: &Amqp, app: &App, checker: &mut Checker, readers: &Fleet, had: usize, count: usize) -> u64 {
    let mut times = Vec::new();
    for number in 0..count {
        let request = request(app, &"x".repeat(4000));
        let start = now_ms();
        let replies = amqp.burst(std::slice::from_ref(&request)).await;
        let id = replies[0]["msg"]["broadcastId"].as_u64().unwrap();
        checker.all_accepted(&[request], &replies);
        readers.until_each_had(had + number + 1, SOON).await;
        times.push(readers.last_had_ms(id) - start);
    }
    times.sort_unstable();
    times[count / 2]
}

/// Row 29: 1,000 of 2,000 devices stop reading, and the others have everything as soon as if those were not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_devices_that_stop_reading_cost_the_others_and_the_memory_little() {
    const EACH: usize = 1000;
    let app = App::unlimited();
    let stack = Stack::new(std::slice::from_ref(&app));
    // Small socket buffers on both sides: who does not read is behind after a few broadcasts. No pong comes from it either.
    let node = async {
        stack.role("node").with("node.send_buffer_bytes", "4096").with("node.ping_seconds", "600").start().await
    };
    let (_worker, node) = tokio::join!(stack.worker(), node);
    let amqp = stack.amqp().await;
    let mut readers = Fleet::new(&app, EACH);
    let mut sleepers = Fleet::new(&app, EACH).receive_buffer(4096);
    readers.launch(&[node.device_url()], Afterwards::Stay);
    readers.until_online(STORM).await;

    let mut checker = Checker::default();
    // What the same readers take while they are alone.
    let before = time_to_last(&amqp, &app, &mut checker, &readers, 0, 40).await;
    sleepers.launch(&[node.device_url()], Afterwards::Stay);
    sleepers.until_online(STORM).await;
    sleepers.stop_reading();
    time_to_last(&amqp, &app, &mut checker, &readers, 40, 20).await;
    until("1,000 behind", SOON, async || match node.metric("broadcastd_sessions_behind").await {
        behind if behind >= EACH as f64 => Ok(()),
        behind => Err(behind),
    })
    .await;
    let stalled = resident(&node);
    let meanwhile = time_to_last(&amqp, &app, &mut checker, &readers, 60, 100).await;
    let later = resident(&node);
    println!(
        "row 29: median time to the last of {EACH} readers {before} ms before, {meanwhile} ms with {EACH} stalled; \
         node's memory {stalled} KiB when they stalled, {later} KiB after 100 broadcasts of 4 kB more"
    );
    // A queue each would hold 400 KiB a device; here it is the frames themselves, once, and what the allocator rounds up.
    assert!(later < stalled + 2 * 1024, "{stalled} KiB grew to {later} KiB");
    // It takes what it takes without them: twice, and a time slice, is for the others on the machine.
    assert!(meanwhile <= before * 2 + 20, "{before} ms became {meanwhile} ms");
    assert_eq!(sleepers.count(|record| record.history.len() > 20), 0, "they do read");

    sleepers.read_on();
    sleepers.until_each_had(120, STORM).await;
    readers.check(&checker, |_| Must::Everything);
    sleepers.check(&checker, |record| Must::After(record.head));
    assert_eq!(sleepers.count(|record| record.logins == 1 && record.ends.is_empty()), EACH, "on the same connections");
    let behind = async || match node.metric("broadcastd_sessions_behind").await {
        0.0 => Ok(()),
        behind => Err(behind),
    };
    until("nobody behind", Duration::from_secs(5), behind).await;
    after_row(&stack).await;
}
