//! Every key and channel of the Redis ledger. All of an app's share the hash tag `{app}`, so they live in one cluster slot and
//! one script may touch them all.

use crate::broadcast::app::AppKey;
use crate::ledger::NodeName;

/// Makes the names, under one prefix (`bc:` by default).
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// `prefix` goes in front of every key and channel.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// String: head, generations, next expiry.
    #[must_use]
    pub fn meta(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:meta", self.prefix)
    }

    /// String: 61 one-second counters.
    #[must_use]
    pub fn rate_minute(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:rate:minute", self.prefix)
    }

    /// String: the UTC day and its count.
    #[must_use]
    pub fn rate_day(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:rate:day", self.prefix)
    }

    /// String: the stored verdict of a request id; expires with the dedupe window.
    #[must_use]
    pub fn request(&self, app: &AppKey, request_id: &str) -> String {
        format!("{}{{{app}}}:request:{request_id}", self.prefix)
    }

    /// String, empty: a mark that was used, such as a call's check sum; expires when it could not be used anyway.
    #[must_use]
    pub fn used(&self, app: &AppKey, mark: &str) -> String {
        format!("{}{{{app}}}:used:{mark}", self.prefix)
    }

    /// Sorted set: retained envelopes by id, at most 100.
    #[must_use]
    pub fn retained(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:retained", self.prefix)
    }

    /// Stream: every envelope, its id as the entry's, bounded.
    #[must_use]
    pub fn log(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:log", self.prefix)
    }

    /// Sorted set: nodes by the end of their lease, in milliseconds.
    #[must_use]
    pub fn nodes(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:nodes", self.prefix)
    }

    /// What every presence channel of the app starts with; the node's name follows.
    #[must_use]
    pub fn channel_prefix(&self, app: &AppKey) -> String {
        format!("{}{{{app}}}:node:", self.prefix)
    }

    /// The presence channel of one node for one app.
    #[must_use]
    pub fn channel(&self, app: &AppKey, node: &NodeName) -> String {
        format!("{}{node}", self.channel_prefix(app))
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
        assert_eq!(keys.app_of_channel(&channel), Some(app));
        assert_eq!(keys.app_of_channel("other:{demo}:node:n1"), None);
    }
}
