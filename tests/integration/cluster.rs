//! Redis Cluster: the same scripts, sharded subscriptions, apps on different masters.

use futures_util::future::join_all;

use crate::support::SOON;
use crate::support::broadcastd::App;
use crate::support::device::Device;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::RedisCluster;
use crate::support::sender::{request, retained};
use crate::support::stack::Stack;

#[tokio::test]
async fn apps_on_every_master_are_served() {
    // Twelve keys fall on all three masters but for one chance in a hundred; it does not matter then.
    let apps: Vec<App> = (0..12).map(|_| App::new()).collect();
    let cluster = RedisCluster::shared();
    let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &cluster.url(), &apps);
    stack.redis_mode = "cluster".to_owned();
    let (_worker, node, other_node) = tokio::join!(stack.worker(), stack.node(), stack.node());
    let amqp = stack.amqp().await;
    for app in &apps {
        amqp.accepted(&retained(app, "retained")).await;
    }
    let (url, other_url) = (node.device_url(), other_node.device_url());
    let mut devices = join_all(apps.iter().map(|app| Device::online(app, "ios", &url))).await;
    devices.extend(join_all(apps.iter().map(|app| Device::online(app, "web", &other_url))).await);
    for app in &apps {
        amqp.accepted(&request(app, &format!("for {}", app.key))).await;
    }
    for (device, app) in devices.iter_mut().zip(apps.iter().chain(&apps)) {
        device.collect(2, SOON).await;
        let contents: Vec<&str> = device.history().iter().map(|arrival| arrival.content.as_str()).collect();
        assert_eq!(contents, ["retained", &format!("for {}", app.key)]);
    }
}
