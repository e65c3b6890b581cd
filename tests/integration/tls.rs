//! RabbitMQ and Redis that take TLS only: it works when it should, and says why when it does not.

use serde_json::Value;

use crate::support::broadcastd::{App, Process};
use crate::support::certificates::{Authority, Certificate};
use crate::support::device::Device;
use crate::support::rabbitmq::RabbitMq;
use crate::support::redis::{Redis, RedisCluster};
use crate::support::sender::Api;
use crate::support::stack::Stack;
use crate::support::{SOON, until};

const HOST: [&str; 1] = ["localhost"];

/// One broadcast by HTTP to a device on a WebSocket, through worker, API and node; and a retained one to a device that is late.
async fn works(app: &App, role: impl Fn(&str) -> Process) {
    let (_worker, api, node) = tokio::join!(role("worker").start(), role("api").start(), role("node").start());
    let mut device = Device::online(app, "ios", &node.device_url()).await;
    let sender = Api::new(&api.api_url(), app);
    sender.broadcast("hello", false).await;
    let kept = sender.broadcast("kept", true).await;
    assert_eq!(device.expect_broadcast(SOON).await.content, "hello");
    assert_eq!(device.expect_broadcast(SOON).await.content, "kept");
    let mut late = Device::online(app, "web", &node.device_url()).await;
    assert_eq!(late.expect_broadcast(SOON).await.content, "kept");
    let found = sender.call("history/queryBroadcastMsgById.action", &[("broadcastId", &kept.to_string())]).await;
    assert_eq!(found["msg"]["body"], "kept", "{found}");
}

/// Waits until `/readyz` gives this reason for the dependency.
async fn refused(mut process: Process, dependency: &str, reason: &str) {
    process.spawn();
    until("refused for the right reason", SOON, async || {
        let (_, body) = process.readiness().await?;
        let body: Value = serde_json::from_str(&body).map_err(|error| error.to_string())?;
        let said = body["dependencies"][dependency]["reason"].as_str().unwrap_or("ready").to_owned();
        if said.contains(reason) { Ok(()) } else { Err(format!("{said:?}, not {reason:?}")) }
    })
    .await;
    let (_, body) = process.readiness().await.unwrap();
    for secret in ["broadcastd-password", "change-me"] {
        assert!(!body.contains(secret) && !process.output().contains(secret), "{body}\n{}", process.output());
    }
}

#[tokio::test]
async fn every_role_works_over_tls_and_says_why_it_does_not() {
    let authority = Authority::new();
    let server = authority.sign("server", &HOST);
    let rabbitmq = RabbitMq::with_tls(&server, false);
    let redis = Redis::with_tls(&server, false, &[]);
    let app = App::new();
    let stack = Stack::on(&rabbitmq.vhost().url, &redis.url(), std::slice::from_ref(&app));
    assert!(stack.amqp_url.starts_with("amqps://") && stack.redis_url.starts_with("rediss://"));
    let ca = authority.ca();
    let role = |role: &str| stack.role(role).with("amqp.ca_file", &ca).with("redis.ca_file", &ca);
    works(&app, role).await;

    let other = Authority::new().ca();
    let address = |url: &str| url.replace("localhost", "127.0.0.1");
    let plain = |url: &str| url.replace("amqps", "amqp").replace("rediss", "redis");
    let no_authority = "no authority that is trusted here";
    let amqp = |process: Process, reason| refused(process, "amqp", reason);
    let redis = |process: Process, reason| refused(process, "redis", reason);
    tokio::join!(
        amqp(role("worker").with("amqp.ca_file", &other), no_authority),
        amqp(role("api").with("amqp.ca_file", &other), no_authority),
        amqp(role("worker").with("amqp.ca_file", ""), no_authority),
        amqp(role("worker").with("amqp.url", address(&stack.amqp_url)), "for another host"),
        amqp(stack.role("worker").with("amqp.url", plain(&stack.amqp_url)), "does the broker want TLS"),
        redis(role("worker").with("redis.ca_file", &other), no_authority),
        redis(role("api").with("redis.ca_file", &other), no_authority),
        redis(role("node").with("redis.ca_file", &other), no_authority),
        redis(role("node").with("redis.ca_file", ""), no_authority),
        redis(role("worker").with("redis.url", address(&stack.redis_url)), "for another host"),
        redis(stack.role("worker").with("redis.url", plain(&stack.redis_url)), "does Redis want TLS"),
    );
}

#[tokio::test]
async fn a_server_without_tls_is_named_as_such() {
    let app = App::new();
    let stack = Stack::new(std::slice::from_ref(&app));
    let ca = Authority::new().ca();
    let secure = |url: &str| url.replace("amqp://", "amqps://").replace("redis://", "rediss://");
    let amqp = stack.role("worker").with("amqp.url", secure(&stack.amqp_url)).with("amqp.ca_file", &ca);
    let redis = stack.role("node").with("redis.url", secure(&stack.redis_url)).with("redis.ca_file", &ca);
    tokio::join!(refused(amqp, "amqp", "speaks no TLS"), refused(redis, "redis", "does Redis speak TLS"));
}

#[tokio::test]
async fn client_certificates_are_shown_where_they_are_wanted() {
    let authority = Authority::new();
    let server = authority.sign("server", &HOST);
    let rabbitmq = RabbitMq::with_tls(&server, true);
    let redis = Redis::with_tls(&server, true, &[]);
    let app = App::new();
    let stack = Stack::on(&rabbitmq.vhost().url, &redis.url(), std::slice::from_ref(&app));
    let ca = authority.ca();
    let anonymous = |role: &str| stack.role(role).with("amqp.ca_file", &ca).with("redis.ca_file", &ca);
    let shown = |process: Process, Certificate { certificate, key, .. }: &Certificate| {
        let process = process.with("amqp.client_certificate_file", certificate).with("amqp.client_key_file", key);
        process.with("redis.client_certificate_file", certificate).with("redis.client_key_file", key)
    };
    let client = authority.sign("client", &["client.example"]);
    works(&app, |role| shown(anonymous(role), &client)).await;

    let stranger = Authority::new().sign("stranger", &["client.example"]);
    tokio::join!(
        refused(anonymous("worker"), "amqp", "certificate of its clients"),
        refused(anonymous("node"), "redis", "certificate of its clients"),
        refused(shown(anonymous("worker"), &stranger), "amqp", "does not accept this client's certificate"),
        refused(shown(anonymous("node"), &stranger), "redis", "does not accept this client's certificate"),
    );
}

#[tokio::test]
async fn a_master_is_found_over_tls_through_a_sentinel() {
    let authority = Authority::new();
    let server = authority.sign("server", &["localhost", "127.0.0.1"]);
    let redis = Redis::with_tls(&server, false, &[]);
    let Certificate { ca, certificate, key } = &server;
    let files =
        [format!("tls-ca-cert-file {ca}"), format!("tls-cert-file {certificate}"), format!("tls-key-file {key}")];
    let files: Vec<&str> = files.iter().map(String::as_str).chain(["tls-auth-clients no"]).collect();
    let (_sentinel, port) = super::permissions::sentinel(&redis, &files);
    let app = App::new();
    let url = redis.url().replace(&redis.port().to_string(), &port.to_string());
    let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &url, std::slice::from_ref(&app));
    stack.redis_mode = "sentinel".to_owned();
    works(&app, |role| stack.role(role).with("redis.ca_file", ca)).await;
    refused(stack.role("node").with("redis.ca_file", Authority::new().ca()), "redis", "").await;
}

#[tokio::test]
async fn a_cluster_is_reached_over_tls() {
    let authority = Authority::new();
    // Its servers tell each other's addresses, not names.
    let cluster = RedisCluster::with_tls(&authority.sign("server", &["localhost", "127.0.0.1"]));
    let apps: Vec<App> = (0..6).map(|_| App::new()).collect();
    let mut stack = Stack::on(&RabbitMq::shared().vhost().url, &cluster.url(), &apps);
    stack.redis_mode = "cluster".to_owned();
    let ca = authority.ca();
    works(&apps[0], |role| stack.role(role).with("redis.ca_file", &ca)).await;
    let other = Authority::new().ca();
    refused(stack.role("node").with("redis.ca_file", &other), "redis", "").await;
}
