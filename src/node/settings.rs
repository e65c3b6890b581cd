//! The section `[node]`.

use std::time::Duration;

use serde::Deserialize;

/// The longest time that can be set, in seconds: nothing added to an instant overflows.
const DAY: u64 = 86_400;

/// The node's settings. The defaults stand in the built-in settings file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSettings {
    /// This process's name among the nodes, never that of two at once; empty: the host's name and a random suffix.
    pub name: String,
    /// Threads that own sockets; 0: one a core.
    pub shards: usize,
    /// How long a lease holds without being renewed, in seconds.
    pub lease_seconds: u64,
    /// How often the leases are renewed, in seconds. A lost last message is found within this time.
    pub renew_seconds: u64,
    /// How long a connection may take to log in, in seconds.
    pub login_seconds: u64,
    /// How often each device is pinged, in seconds. One that is not heard from after two pings is closed.
    pub ping_seconds: u64,
    /// A device that comes back within so many seconds counts as having been online.
    pub resume_seconds: u64,
    /// How many of an app's latest frames are kept for devices that fall behind or come back.
    pub recent_frames: usize,
    /// The same, in bytes.
    pub recent_bytes: usize,
    /// The most connections at a time; one more is answered 503.
    pub max_sessions: usize,
    /// The most connections at a time from one address (of IPv6: from one /64); one more is answered 429. 0: any number.
    pub max_sessions_per_address: u32,
    /// The most sessions of one app at a time; one more is told 503 and closed with 1013. 0: any number.
    pub max_sessions_per_app: u32,
    /// The most connections accepted in a second; more of them wait in the listen queue.
    pub accept_per_second: u32,
    /// How long an app without sessions keeps its lease, in seconds.
    pub linger_seconds: u64,
    /// The sockets' send buffer, in bytes; 0: the system's own choice.
    pub send_buffer_bytes: usize,
    /// The `Origin` values that browsers may connect from; empty: any.
    pub allowed_origins: Vec<String>,
    /// Whether a login without a token is taken. For development only.
    pub tokenless_login: bool,
}

impl NodeSettings {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn validate(&self) -> Result<(), String> {
        for (key, value, least, most) in [
            ("lease_seconds", self.lease_seconds, 1, DAY),
            ("renew_seconds", self.renew_seconds, 1, DAY),
            ("login_seconds", self.login_seconds, 1, DAY),
            ("ping_seconds", self.ping_seconds, 1, DAY),
            ("resume_seconds", self.resume_seconds, 0, DAY),
            ("linger_seconds", self.linger_seconds, 0, DAY),
            ("recent_frames", self.recent_frames as u64, 1, 1 << 20),
            ("recent_bytes", self.recent_bytes as u64, 1, 1 << 30),
            ("send_buffer_bytes", self.send_buffer_bytes as u64, 0, 1 << 30),
            // A place in the slab and a count of sessions have 32 bits.
            ("max_sessions", self.max_sessions as u64, 1, 1 << 30),
            ("max_sessions_per_address", u64::from(self.max_sessions_per_address), 0, 1 << 30),
            ("max_sessions_per_app", u64::from(self.max_sessions_per_app), 0, 1 << 30),
            ("accept_per_second", u64::from(self.accept_per_second), 1, 1_000_000),
            ("shards", self.shards as u64, 0, 1024),
        ] {
            if value < least {
                return Err(format!("node.{key} must be at least {least}"));
            }
            if value > most {
                return Err(format!("node.{key} must be at most {most}"));
            }
        }
        if self.renew_seconds * 2 >= self.lease_seconds {
            return Err(
                "node.renew_seconds must be less than half of node.lease_seconds, so that one renewal may fail".into(),
            );
        }
        if self.name.len() > 64
            || !self.name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        {
            return Err("node.name has at most 64 characters of A-Z a-z 0-9 _ . -".into());
        }
        Ok(())
    }

    /// The name, made up if none is set.
    #[must_use]
    pub(super) fn node_name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.clone();
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host: String =
            host.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')).take(48).collect();
        let host = if host.is_empty() { "node" } else { &host };
        format!("{host}-{:08x}", fastrand::u32(..))
    }

    /// How many shards there are.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        if self.shards > 0 { self.shards } else { std::thread::available_parallelism().map_or(1, Into::into) }
    }

    pub(super) const fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }

    pub(super) const fn renew(&self) -> Duration {
        Duration::from_secs(self.renew_seconds)
    }

    pub(super) const fn login(&self) -> Duration {
        Duration::from_secs(self.login_seconds)
    }

    pub(super) const fn ping(&self) -> Duration {
        Duration::from_secs(self.ping_seconds)
    }

    pub(super) const fn linger(&self) -> Duration {
        Duration::from_secs(self.linger_seconds)
    }

    /// The documented defaults, for tests.
    #[cfg(test)]
    pub(crate) fn for_tests() -> Self {
        Self {
            name: String::new(),
            shards: 2,
            lease_seconds: 15,
            renew_seconds: 3,
            login_seconds: 10,
            ping_seconds: 30,
            resume_seconds: 60,
            recent_frames: 1024,
            recent_bytes: 4 << 20,
            max_sessions: 1_000_000,
            max_sessions_per_address: 0,
            max_sessions_per_app: 0,
            accept_per_second: 5000,
            linger_seconds: 60,
            send_buffer_bytes: 0,
            allowed_origins: Vec::new(),
            tokenless_login: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        assert_eq!(NodeSettings::for_tests().validate(), Ok(()));
        let broken = |change: fn(&mut NodeSettings)| {
            let mut settings = NodeSettings::for_tests();
            change(&mut settings);
            settings.validate().unwrap_err()
        };
        assert!(broken(|s| s.renew_seconds = 8).contains("renew_seconds"));
        assert!(broken(|s| s.login_seconds = u64::MAX).contains("login_seconds must be at most 86400"));
        assert!(broken(|s| s.shards = 1025).contains("shards"));
        assert!(broken(|s| s.recent_frames = 0).contains("recent_frames"));
        assert!(broken(|s| s.name = "a}b".into()).contains("name"));
    }

    #[test]
    fn a_made_up_name_is_one_of_its_own() {
        let settings = NodeSettings::for_tests();
        assert_ne!(settings.node_name(), settings.node_name());
    }
}
