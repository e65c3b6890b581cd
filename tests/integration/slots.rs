//! Redis Cluster in motion: a slot that moves under load, and a master that comes back without what it wrote last.

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::after_row::{after_lost_data, after_row};
use crate::support::broadcastd::{App, Process};
use crate::support::checker::{Checker, Must};
use crate::support::device::Device;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::{Move, RedisCluster};
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;
use crate::support::{SOON, now_ms, until};

/// Every third is retained.
fn requests(app: &App, what: &str, count: usize) -> Vec<Value> {
    let one = |number: usize| {
        let body = format!("{what} {number}");
        if number.is_multiple_of(3) { retained(app, &body) } else { request(app, &body) }
    };
    (0..count).map(one).collect()
}

fn stack(cluster: &RedisCluster, app: &App) -> Stack {
    let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &cluster.urls(), std::slice::from_ref(app));
    stack.redis_mode = "cluster".to_owned();
    stack
}

async fn held(worker: &Process) {
    until("held requests", SOON, async || match worker.metric("broadcastd_requests_held").await {
        0.0 => Err(0.0),
        _ => Ok(()),
    })
    .await;
}

/// The scripts' keys are on two masters for a while: held, not dead-lettered. The sharded subscription follows the slot.
#[tokio::test]
async fn a_slot_that_moves_under_load_loses_and_doubles_nothing() {
    let app = App::unlimited();
    let cluster = RedisCluster::start();
    let stack = stack(&cluster, &app);
    // Renewals find what a subscription misses; here they would hide that it did not follow.
    let node =
        async { stack.role("node").with("node.renew_seconds", "300").with("node.lease_seconds", "1000").start().await };
    let (mut worker, node) = tokio::join!(stack.worker(), node);
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let before = requests(&app, "before", 30);
    let replies = amqp.burst(&before).await;
    checker.all_accepted(&before, &replies);

    let slot = cluster.slot(&app.key);
    let (from, mut sent) = (cluster.owner(slot), before.len());
    // There, on, and back: each master is met as the old one, and as the new one.
    for to in [(from + 1) % 3, (from + 2) % 3, from] {
        let (under_way, between) =
            (requests(&app, &format!("to {to}"), 30), requests(&app, &format!("half at {to}"), 15));
        let moving = async {
            until("load", SOON, async || if amqp.replies() > sent { Ok(()) } else { Err("none") }).await;
            let moving = Move::begin(&cluster, slot, to);
            moving.keys(10);
            let finishing = async {
                held(&worker).await;
                moving.finish();
            };
            tokio::join!(amqp.burst(&between), finishing).0
        };
        let (replies, replies_between) = tokio::join!(amqp.burst(&under_way), moving);
        checker.all_accepted(&under_way, &replies);
        checker.all_accepted(&between, &replies_between);
        sent += under_way.len() + between.len();
        device.collect(sent, SOON).await;
        let after = requests(&app, &format!("at {to}"), 6);
        let replies = amqp.burst(&after).await;
        checker.all_accepted(&after, &replies);
        sent += after.len();
        device.collect(sent, SOON).await;
        assert_eq!(cluster.owner(slot), to);
    }
    worker.wait_ready().await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    let other_node = stack.node().await;
    let joined_ms = now_ms();
    let mut late = Device::online(&app, "ios", &other_node.device_url()).await;
    late.collect(device.history().iter().filter(|had| is_retained(&had.content)).count(), SOON).await;
    checker.device(late.history(), Must::RetainedUpTo(late.head()), joined_ms).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    // Nothing was lost, so nothing is to be made up for: ids have not jumped, nothing was written back.
    assert_eq!(node.metric("broadcastd_restored_total").await, 0.0);
    assert_eq!(node.metric("broadcastd_lost_envelopes_total").await, 0.0);
    after_row(&stack).await;
}

fn is_retained(content: &str) -> bool {
    content.rsplit(' ').next().unwrap().parse::<usize>().unwrap().is_multiple_of(3)
}

/// The requests of an app whose slot moves are held; those of other apps go on beside them, however many they are.
#[tokio::test]
async fn a_slot_that_moves_holds_up_no_other_app() {
    let cluster = RedisCluster::start();
    let (app, other) = (App::unlimited(), App::unlimited());
    let mut stack = stack(&cluster, &app);
    stack.apps.push(other.clone());
    let mut worker = stack.role("worker").with("worker.batch", "4").start().await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let before = requests(&app, "before", 30);
    let replies = amqp.burst(&before).await;
    checker.all_accepted(&before, &replies);

    let slot = cluster.slot(&app.key);
    assert_ne!(slot, cluster.slot(&other.key), "one in 16384");
    let moving = Move::begin(&cluster, slot, (cluster.owner(slot) + 1) % 3);
    moving.keys(10);
    let requests_held = requests(&app, "held", 60);
    let mut asked = Vec::new();
    let mut others = Checker::default();
    for (round, group) in requests_held.chunks(3).enumerate() {
        for request in group {
            asked.push(amqp.ask(request.to_string().as_bytes()).await);
        }
        let beside = requests(&other, &format!("round {round}"), 3);
        let replies = amqp.burst(&beside).await;
        others.all_accepted(&beside, &replies);
    }
    until("held", SOON, async || match worker.metric("broadcastd_requests_held").await {
        60.0 => Ok(()),
        held => Err(held),
    })
    .await;
    assert!(asked.iter().all(|asked| amqp.all_replies(asked).is_empty()), "they could be decided");
    worker.wait_unready().await;
    moving.finish();
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    checker.all_accepted(&requests_held, &replies);
    worker.wait_ready().await;
    assert_eq!(worker.metric("broadcastd_requests_held").await, 0.0);
    assert_eq!(worker.metric("broadcastd_worker_sessions_total").await, 1.0);
}

/// Row 19 in a cluster, whose connection reconnects behind the worker's back: the master is back before anyone has asked whether
/// it is still the one that it was.
#[tokio::test]
async fn a_cluster_master_back_without_its_tail_before_anyone_notices() {
    let app = App::unlimited();
    let mut cluster = RedisCluster::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let stack = stack(&cluster, &app);
    // It stops with the 19th request in its hands, as sure as can be of who Redis is.
    let worker =
        async { stack.role("worker").failpoints("worker::before-ledger=18*off->1*return(stop)").start().await };
    let (worker, node) = tokio::join!(worker, stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let owner = cluster.owner(cluster.slot(&app.key));
    let file = cluster.masters()[owner].folder().join("appendonlydir/appendonly.aof.1.incr.aof");
    let kept = requests(&app, "kept", 9);
    let replies = amqp.burst(&kept).await;
    checker.all_accepted(&kept, &replies);
    let length = std::fs::metadata(&file).unwrap().len();
    let lost = requests(&app, "lost", 9);
    let replies = amqp.burst(&lost).await;
    checker.all_accepted(&lost, &replies);
    device.collect(18, SOON).await;

    // The node cannot tell what was lost before the worker goes on.
    node.pause();
    let after = requests(&app, "after", 9);
    let payloads: Vec<String> = after.iter().map(Value::to_string).collect();
    let asked = join_all(payloads.iter().map(|payload| amqp.ask(payload.as_bytes()))).await;
    until("stopped", SOON, async || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", worker.pid())).unwrap();
        if stat.rsplit(") ").next().unwrap().starts_with('T') { Ok(()) } else { Err(stat) }
    })
    .await;
    let master = &mut cluster.masters_mut()[owner];
    master.kill();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(length).unwrap();
    master.start();
    until("the cluster whole", SOON, async || match cluster.masters()[owner].command(&["CLUSTER", "INFO"]) {
        info if info.contains("cluster_state:ok") => Ok(()),
        info => Err(info),
    })
    .await;
    worker.resume();
    let replies = join_all(asked.iter().map(|correlation| amqp.reply(correlation))).await;
    node.resume();
    checker.all_accepted(&after, &replies);
    device.collect(27, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    after_lost_data(&stack).await;
}

/// Row 20 in a cluster: the cluster itself promotes a replica that is behind.
#[tokio::test]
async fn a_cluster_replica_promoted_while_behind() {
    let app = App::unlimited();
    let mut cluster = RedisCluster::start();
    let owner = cluster.owner(cluster.slot(&app.key));
    let replica = cluster.replica(owner);
    let stack = stack(&cluster, &app);
    let (mut worker, mut node) = tokio::join!(stack.worker(), stack.node());
    let mut device = Device::online(&app, "web", &node.device_url()).await;
    let amqp = stack.amqp().await;
    let mut checker = Checker::default();
    let kept = requests(&app, "kept", 9);
    let replies = amqp.burst(&kept).await;
    checker.all_accepted(&kept, &replies);
    until("replicated", SOON, async || match replica.command(&["DBSIZE"]) {
        size if size == cluster.masters()[owner].command(&["DBSIZE"]) => Ok(()),
        size => Err(size),
    })
    .await;
    replica.pause();
    cluster.masters()[owner].command(&["CLIENT", "KILL", "TYPE", "replica"]);
    let lost = requests(&app, "lost", 9);
    let replies = amqp.burst(&lost).await;
    checker.all_accepted(&lost, &replies);
    device.collect(18, SOON).await;
    cluster.masters_mut()[owner].kill();
    replica.resume();
    let after = requests(&app, "after", 9);
    let replies = amqp.burst(&after).await;
    checker.all_accepted(&after, &replies);
    tokio::join!(worker.wait_ready(), node.wait_ready());
    assert!(replica.command(&["INFO", "replication"]).contains("role:master"));
    device.collect(27, SOON).await;
    checker.device(device.history(), Must::Everything, 0).unwrap();
    until("what was lost, written back", SOON, async || match node.metric("broadcastd_restored_total").await {
        3.0 => Ok(()),
        restored => Err(restored),
    })
    .await;
    let other_node = stack.node().await;
    let joined_ms = now_ms();
    let mut late = Device::online(&app, "ios", &other_node.device_url()).await;
    late.collect(9, SOON).await;
    checker.device(late.history(), Must::RetainedUpTo(late.head()), joined_ms).unwrap();
    assert_eq!(amqp.ready("broadcast.dead").await, 0);
    after_lost_data(&stack).await;
}
