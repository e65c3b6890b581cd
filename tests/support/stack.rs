//! A whole installation of one test: its vhost, its key prefix, its apps, and the roles on top.

use super::broadcastd::{App, Process};
use super::rabbitmq::RabbitMq;
use super::redis::Redis;
use super::sender::Amqp;
use super::unique;

/// Where the roles of a test find each other. It starts nothing by itself.
#[derive(Debug, Clone)]
pub struct Stack {
    /// Address of the vhost.
    pub amqp_url: String,
    /// Address of Redis.
    pub redis_url: String,
    /// `single` or `cluster`.
    pub redis_mode: String,
    /// Keys and channels of this test.
    pub prefix: String,
    /// The apps that every role knows.
    pub apps: Vec<App>,
}

impl Stack {
    /// On the shared servers.
    pub fn new(apps: &[App]) -> Self {
        Self::on(&RabbitMq::shared().vhost().url, &Redis::shared().url(), apps)
    }

    /// On servers of one's own.
    pub fn on(amqp_url: &str, redis_url: &str, apps: &[App]) -> Self {
        Self {
            amqp_url: amqp_url.to_owned(),
            redis_url: redis_url.to_owned(),
            redis_mode: "single".to_owned(),
            prefix: Redis::prefix(),
            apps: apps.to_vec(),
        }
    }

    /// A role, not started.
    pub fn role(&self, role: &str) -> Process {
        Process::new(role, &self.apps)
            .with("amqp.url", &self.amqp_url)
            .with("redis.url", &self.redis_url)
            .with("redis.mode", &self.redis_mode)
            .with("redis.key_prefix", &self.prefix)
            .with("node.name", unique("node"))
    }

    /// A worker that is ready.
    pub async fn worker(&self) -> Process {
        self.role("worker").start().await
    }

    /// A node that is ready.
    pub async fn node(&self) -> Process {
        self.role("node").start().await
    }

    /// An API that is ready.
    pub async fn api(&self) -> Process {
        self.role("api").start().await
    }

    /// A plain AMQP client; what it sends for the apps is noted in their journals.
    pub async fn amqp(&self) -> Amqp {
        Amqp::connect(&self.amqp_url).await.noting(&self.apps)
    }

    /// When the lease of the app's one node ends, by that server, in milliseconds since the Unix epoch; 0 if there is none.
    pub fn lease_end(&self, server: &Redis, app: &App) -> u64 {
        let nodes = format!("{}{{{}}}:nodes", self.prefix, app.key);
        let answer = server.command(&["ZRANGE", &nodes, "0", "-1", "WITHSCORES"]);
        answer.lines().nth(1).map_or(0, |score| score.parse().unwrap())
    }
}
