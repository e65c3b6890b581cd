//! The support itself.

use std::collections::BTreeMap;

use crate::support::guard::{Guarded, folder};
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::{Redis, RedisCluster};
use crate::support::{SOON, ports, until_blocking};

#[test]
fn a_free_port_is_handed_out_once() {
    let ports: std::collections::BTreeSet<u16> = (0..200).map(|_| ports::free()).collect();
    assert_eq!(ports.len(), 200);
}

#[test]
fn a_guarded_process_dies_with_its_children() {
    let folder = folder("guard");
    let output = folder.join("output");
    let script = "sleep 1000 & echo $! $$; wait";
    let process = Guarded::spawn("sleeper", &["sh", "-c", script], &BTreeMap::new(), &output);
    let text = until_blocking("started", SOON, || match process.output() {
        text if text.ends_with('\n') => Ok(text),
        text => Err(text),
    });
    let pids: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(pids.len(), 2);
    drop(process);
    for pid in pids {
        until_blocking("gone", SOON, || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") { Ok(()) } else { Err(stat) }
        });
    }
}

#[test]
fn redis_keeps_its_append_only_file_over_a_kill() {
    let mut redis = Redis::durable();
    redis.command(&["SET", "a", "1"]);
    redis.kill();
    redis.start();
    assert_eq!(redis.command(&["GET", "a"]), "1");
}

#[test]
fn the_cluster_serves_every_slot() {
    let cluster = RedisCluster::shared();
    assert_eq!(cluster.masters().len(), 3);
    assert!(cluster.masters()[2].command(&["CLUSTER", "INFO"]).contains("cluster_slots_ok:16384"));
}

#[tokio::test]
async fn rabbitmq_keeps_a_vhost_over_a_kill_and_a_restart() {
    let mut rabbitmq = RabbitMq::dedicated();
    let vhost = rabbitmq.vhost();
    crate::support::sender::Amqp::connect(&vhost.url).await;
    rabbitmq.kill();
    rabbitmq.start();
    crate::support::sender::Amqp::connect(&vhost.url).await;
    rabbitmq.stop();
    rabbitmq.start();
    crate::support::sender::Amqp::connect(&vhost.url).await;
    rabbitmq.memory_alarm(true);
    rabbitmq.memory_alarm(false);
}
