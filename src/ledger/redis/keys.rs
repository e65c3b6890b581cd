//! Every key and channel of the Redis ledger. All of an app's share the hash tag `{app}`, so they live in one cluster slot and
//! one script may touch them all.

use std::fmt;
use std::io::Write;

use redis::{RedisWrite, ToRedisArgs, ToSingleRedisArg};

use crate::broadcast::app::AppKey;
use crate::ledger::NodeName;

/// Makes the names, under one prefix (`bc:` by default).
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

/// A key, which writes itself into a command: no string of its own, of which an acceptance would need eight.
#[derive(Debug, Clone, Copy)]
pub struct Key<'a> {
    prefix: &'a str,
    app: &'a AppKey,
    name: &'static str,
    mark: &'a str,
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prefix, app, name, mark } = self;
        write!(formatter, "{prefix}{{{app}}}:{name}{mark}")
    }
}

impl ToRedisArgs for Key<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let mut writer = out.writer_for_next_arg();
        for part in [self.prefix, "{", self.app.as_str(), "}:", self.name, self.mark] {
            // Into a command's own memory: that cannot fail.
            let _ = writer.write_all(part.as_bytes());
        }
    }
}

impl ToSingleRedisArg for Key<'_> {}

impl Keys {
    /// `prefix` goes in front of every key and channel.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    const fn key<'a>(&'a self, app: &'a AppKey, name: &'static str, mark: &'a str) -> Key<'a> {
        Key { prefix: self.prefix.as_str(), app, name, mark }
    }

    /// String: head, generations, next expiry.
    #[must_use]
    pub const fn meta<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "meta", "")
    }

    /// String: 61 one-second counters.
    #[must_use]
    pub const fn rate_minute<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "rate:minute", "")
    }

    /// String: the UTC day and its count.
    #[must_use]
    pub const fn rate_day<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "rate:day", "")
    }

    /// String: the stored verdict of a request id; expires with the dedupe window.
    #[must_use]
    pub const fn request<'a>(&'a self, app: &'a AppKey, request_id: &'a str) -> Key<'a> {
        self.key(app, "request:", request_id)
    }

    /// String, empty: a mark that was used, such as a call's check sum; expires when it could not be used anyway.
    #[must_use]
    pub const fn used<'a>(&'a self, app: &'a AppKey, mark: &'a str) -> Key<'a> {
        self.key(app, "used:", mark)
    }

    /// Sorted set: retained envelopes by id, at most 100.
    #[must_use]
    pub const fn retained<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "retained", "")
    }

    /// Stream: every envelope, its id as the entry's, bounded.
    #[must_use]
    pub const fn log<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "log", "")
    }

    /// Sorted set: nodes by the end of their lease, in milliseconds.
    #[must_use]
    pub const fn nodes<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "nodes", "")
    }

    /// What every presence channel of the app starts with; the node's name follows.
    #[must_use]
    pub const fn channel_prefix<'a>(&'a self, app: &'a AppKey) -> Key<'a> {
        self.key(app, "node:", "")
    }

    /// The presence channel of one node for one app.
    #[must_use]
    pub fn channel(&self, app: &AppKey, node: &NodeName) -> String {
        self.key(app, "node:", &node.0).to_string()
    }

    /// The app of a presence channel of this prefix.
    #[must_use]
    pub fn app_of_channel(&self, channel: &str) -> Option<AppKey> {
        let (app, _) = channel.strip_prefix(&self.prefix)?.strip_prefix('{')?.split_once('}')?;
        AppKey::parse(app).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_leads_back_to_its_app() {
        let keys = Keys::new("bc:");
        let app = AppKey::parse("demo").unwrap();
        let channel = keys.channel(&app, &NodeName("n1".into()));
        assert_eq!(channel, "bc:{demo}:node:n1");
        assert_eq!(keys.app_of_channel(&channel), Some(app.clone()));
        let mut command = redis::cmd("GET");
        command.arg(keys.request(&app, "r 1")).arg(keys.channel_prefix(&app));
        let packed = command.get_packed_command();
        assert_eq!(
            String::from_utf8(packed).unwrap(),
            "*3\r\n$3\r\nGET\r\n$21\r\nbc:{demo}:request:r 1\r\n$15\r\nbc:{demo}:node:\r\n"
        );
        assert_eq!(keys.app_of_channel("other:{demo}:node:n1"), None);
    }
}
