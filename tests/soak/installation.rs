//! What the soak runs: private servers, two of each role, and a proxy in front of everything that talks to a server.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::block_in_place;
use tokio::time::sleep;

use crate::support::broadcastd::{App, Process};
use crate::support::proxy::Proxy;
use crate::support::rabbitmq::{RabbitMq, Vhost};
use crate::support::redis::Redis;
use crate::support::stack::Stack;
use crate::support::unique;

/// Two of each. The first is killed, drained and stopped; the second is only stopped and cut off, so that what it holds can be
/// compared over the whole run.
pub const PROCESSES: [&str; 6] = ["worker-1", "worker-2", "node-1", "node-2", "api-1", "api-2"];

/// Shorter than the default, so that silence is noticed within the run's faults.
const HEARTBEAT_SECONDS: &str = "5";

pub struct Installation {
    pub stack: Stack,
    pub vhost: Vhost,
    /// As the default user, who may do all: what is stored is read in a transaction, which the roles have no need of.
    pub redis_url: String,
    pub rabbitmq: Mutex<RabbitMq>,
    pub redis: Mutex<Redis>,
    processes: BTreeMap<&'static str, Mutex<Process>>,
    /// By name: `worker-1 to rabbitmq`, `devices to node-2`.
    pub proxies: BTreeMap<String, Proxy>,
    /// Where devices connect, by the proxies.
    pub device_urls: Vec<String>,
    /// The same without anything in between.
    pub direct_urls: Vec<String>,
    pub api_urls: Vec<String>,
}

impl Installation {
    pub async fn start(apps: &[App]) -> Self {
        let (rabbitmq, redis) = block_in_place(|| {
            let rabbitmq = RabbitMq::dedicated();
            // Synced at each write: with everysec a kill may lose what was written while a sync was under way.
            (rabbitmq, Redis::dedicated(&["--appendonly", "yes", "--appendfsync", "always"]))
        });
        let vhost = rabbitmq.vhost();
        let stack = Stack::on(&vhost.url, &redis.url(), apps);
        let mut proxies = BTreeMap::new();
        let mut processes = BTreeMap::new();
        let (mut device_urls, mut direct_urls, mut api_urls) = (Vec::new(), Vec::new(), Vec::new());
        for name in PROCESSES {
            let role = name.split('-').next().unwrap();
            let to_redis = Proxy::to(redis.port()).await;
            let to_rabbitmq = Proxy::to(rabbitmq.port()).await;
            let process = stack
                .role(role)
                .with("redis.url", to_redis.instead_of(&redis.url(), redis.port()))
                .with("amqp.url", to_rabbitmq.instead_of(&vhost.url, rabbitmq.port()))
                .with("amqp.heartbeat_seconds", HEARTBEAT_SECONDS)
                // A small send buffer: a device that does not read fills it soon.
                .with("node.send_buffer_bytes", "8192")
                .with("node.name", unique(name))
                .with("log.level", "info")
                .start()
                .await;
            match role {
                "node" => {
                    let proxy = Proxy::to(process.public_port()).await;
                    device_urls.push(proxy.instead_of(&process.device_url(), process.public_port()));
                    direct_urls.push(process.device_url());
                    proxies.insert(format!("devices to {name}"), proxy);
                }
                "api" => api_urls.push(process.api_url()),
                _ => {}
            }
            if role != "node" {
                proxies.insert(format!("{name} to rabbitmq"), to_rabbitmq);
            }
            proxies.insert(format!("{name} to redis"), to_redis);
            processes.insert(name, Mutex::new(process));
        }
        block_in_place(|| rabbitmq.settle_new_queues());
        Self {
            stack,
            vhost,
            redis_url: format!("redis://127.0.0.1:{}", redis.port()),
            rabbitmq: Mutex::new(rabbitmq),
            redis: Mutex::new(redis),
            processes,
            proxies,
            device_urls,
            direct_urls,
            api_urls,
        }
    }

    pub fn process(&self, name: &str) -> &Mutex<Process> {
        &self.processes[name]
    }

    /// Waits until every process is ready; fails the run at the deadline, or if one has ended by itself.
    pub async fn wait_ready(&self) {
        for process in self.processes.values() {
            let mut process = process.lock().await;
            // A busy machine may take longer than a test would wait.
            for _ in 0..60 {
                if matches!(process.readiness().await, Ok((200, _))) {
                    break;
                }
                sleep(Duration::from_millis(500)).await;
            }
            process.wait_ready().await;
        }
    }

    /// Copies what the processes have said, for whoever has to find out what went wrong.
    pub async fn keep_outputs(&self, folder: &std::path::Path) {
        let _ = std::fs::create_dir_all(folder);
        for (name, process) in &self.processes {
            if let Ok(process) = tokio::time::timeout(Duration::from_secs(5), process.lock()).await {
                let _ = std::fs::write(folder.join(format!("{name}.log")), process.output());
            }
        }
    }
}
