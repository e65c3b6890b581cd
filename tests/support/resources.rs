//! I5: what processes and servers hold, and whether it stays within bounds.

use std::fmt;
use std::sync::LazyLock;

use super::rabbitmq::{RabbitMq, Vhost};
use super::redis::Redis;

/// What one process holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory, bytes.
    pub rss_bytes: u64,
    /// Open file descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

/// By how much a process may hold more afterwards.
#[derive(Debug, Clone, Copy)]
pub struct Growth {
    /// Resident memory, bytes.
    pub rss_bytes: u64,
    /// Open file descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// Of the process of this id; a sentence if it does not run.
    pub fn of(pid: u32) -> Result<Self, String> {
        static PAGE: LazyLock<u64> = LazyLock::new(|| rustix::param::page_size() as u64);
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).map_err(|e| e.to_string());
        let statm = read("statm")?;
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).ok_or(statm.clone())?;
        // The name in the second field may hold spaces; what follows it does not.
        let stat = read("stat")?;
        let after = stat.rsplit_once(") ").ok_or(stat.clone())?.1;
        let threads = after.split(' ').nth(17).and_then(|threads| threads.parse().ok()).ok_or(stat.clone())?;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(|error| error.to_string())?.count();
        Ok(Self { rss_bytes: pages * *PAGE, descriptors: descriptors as u64, threads })
    }

    /// A sentence if there is more of something than there was before and is allowed to come.
    pub fn within(&self, before: &Self, allowed: Growth) -> Result<(), String> {
        within("bytes resident", before.rss_bytes, self.rss_bytes, allowed.rss_bytes)?;
        within("descriptors", before.descriptors, self.descriptors, allowed.descriptors)?;
        within("threads", before.threads, self.threads, allowed.threads)
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.rss_bytes >> 20;
        write!(f, "{mib} MiB, {} descriptors, {} threads", self.descriptors, self.threads)
    }
}

/// A sentence if `after` is more than `before` and what may come.
pub fn within(what: &str, before: u64, after: u64, allowed: u64) -> Result<(), String> {
    if after > before.saturating_add(allowed) {
        return Err(format!("I5: {after} {what}, {before} before: more than the {allowed} that may come"));
    }
    Ok(())
}

/// What a Redis holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RedisUsage {
    /// Keys, expired ones that it has not removed yet included.
    pub keys: u64,
    /// Its memory, bytes.
    pub used_memory: u64,
    /// Connected clients.
    pub clients: u64,
}

impl RedisUsage {
    /// Of this server; it must answer.
    pub fn of(redis: &Redis) -> Self {
        let info = redis.command(&["INFO"]);
        let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0").trim();
        // `db0:keys=12,expires=3,…`; without keys there is no such line.
        let keys = value("db0:keys=").split(',').next().unwrap_or("0");
        Self {
            keys: keys.parse().unwrap(),
            used_memory: value("used_memory:").parse().unwrap(),
            clients: value("connected_clients:").parse().unwrap(),
        }
    }
}

/// What a vhost of a RabbitMQ holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BrokerUsage {
    /// Connections.
    pub connections: u64,
    /// Channels.
    pub channels: u64,
    /// Queues.
    pub queues: u64,
    /// Messages in them, ready or not acknowledged; as of a few seconds ago.
    pub messages: u64,
}

impl BrokerUsage {
    /// Of this vhost; a sentence if the server does not answer.
    pub fn of(rabbitmq: &RabbitMq, vhost: &Vhost) -> Result<Self, String> {
        let list = |path: String| -> Result<Vec<serde_json::Value>, String> {
            let answer = rabbitmq.management("GET", &path)?;
            answer.as_array().cloned().ok_or_else(|| answer.to_string())
        };
        let name = &vhost.name;
        let queues = list(format!("queues/{name}"))?;
        Ok(Self {
            connections: list(format!("vhosts/{name}/connections"))?.len() as u64,
            channels: list(format!("vhosts/{name}/channels"))?.len() as u64,
            queues: queues.len() as u64,
            messages: queues.iter().filter_map(|queue| queue["messages"].as_u64()).sum(),
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_process_takes_more_is_seen() {
        use super::{Growth, Usage};
        let before = Usage::of(std::process::id()).unwrap();
        assert!(before.rss_bytes > 1 << 20 && before.descriptors >= 3 && before.threads >= 1, "{before}");
        let files: Vec<std::fs::File> = (0..200).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        let after = Usage::of(std::process::id()).unwrap();
        let allowed = Growth { rss_bytes: 1 << 40, descriptors: 100, threads: 1000 };
        assert!(after.within(&before, allowed).unwrap_err().contains("descriptors"), "{before}; {after}");
        drop(files);
        assert!(Usage::of(u32::MAX).is_err());
    }
}
