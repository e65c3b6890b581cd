//! Who listens: the nodes' leases and the node's feed, in memory, for they end with the process.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::broadcast::app::AppKey;
use crate::ledger::{FEED_CAPACITY, Feed, NodeName};

/// Leases by app, and the feed of the node in this process.
#[derive(Debug, Default)]
pub(super) struct Presence {
    /// Until when each node's lease runs, in ms.
    leases: HashMap<AppKey, HashMap<NodeName, u64>>,
    feed: Option<OpenFeed>,
    subscribed: HashSet<AppKey>,
}

/// The last slot of its channel is kept for [`Feed::Interrupted`], so that an overflow is told where it happened.
#[derive(Debug)]
struct OpenFeed {
    node: NodeName,
    sender: mpsc::Sender<Feed>,
    /// Set from an overflow until half the channel is free again. Meanwhile nothing is sent, so the `Interrupted` is still
    /// in the channel, and whatever is dropped is in the log when the node comes to it.
    interrupted: bool,
}

impl Presence {
    pub fn lease(&mut self, app: &AppKey, node: &NodeName, until_ms: u64) {
        self.leases.entry(app.clone()).or_default().insert(node.clone(), until_ms);
    }

    pub fn prune(&mut self, app: &AppKey, now_ms: u64) {
        if let Some(nodes) = self.leases.get_mut(app) {
            nodes.retain(|_, until_ms| *until_ms > now_ms);
        }
    }

    pub fn leave(&mut self, app: &AppKey, node: &NodeName) {
        if let Some(nodes) = self.leases.get_mut(app) {
            nodes.remove(node);
            if nodes.is_empty() {
                self.leases.remove(app);
            }
        }
    }

    pub fn open_feed(&mut self, node: &NodeName) -> mpsc::Receiver<Feed> {
        let (sender, receiver) = mpsc::channel(FEED_CAPACITY + 1);
        self.feed = Some(OpenFeed { node: node.clone(), sender, interrupted: false });
        receiver
    }

    pub fn subscribe(&mut self, app: &AppKey) {
        self.subscribed.insert(app.clone());
    }

    pub fn unsubscribe(&mut self, app: &AppKey) {
        self.subscribed.remove(app);
    }

    /// Nodes that hold a lease, and those of them that are subscribed.
    #[allow(clippy::cast_possible_truncation)] // there are not that many nodes
    pub fn audience(&self, app: &AppKey, now_ms: u64) -> (u32, u32) {
        let targeted =
            self.leases.get(app).map_or(0, |nodes| nodes.values().filter(|until_ms| **until_ms > now_ms).count());
        (targeted as u32, u32::from(self.listener(app, now_ms).is_some()))
    }

    /// Hands an envelope to the node, without ever waiting for it.
    pub fn publish(&mut self, app: &AppKey, raw: &Arc<[u8]>, now_ms: u64) {
        if self.listener(app, now_ms).is_some()
            && let Some(feed) = &mut self.feed
        {
            feed.send(Feed::Published(app.clone(), raw.clone()));
        }
    }

    /// Tells the node to compare positions: something may have been accepted without being published.
    pub fn interrupt(&mut self) {
        if let Some(feed) = &mut self.feed {
            feed.interrupt();
        }
    }

    fn listener(&self, app: &AppKey, now_ms: u64) -> Option<&OpenFeed> {
        let feed = self.feed.as_ref().filter(|feed| !feed.sender.is_closed() && self.subscribed.contains(app))?;
        let until_ms = self.leases.get(app)?.get(&feed.node)?;
        (*until_ms > now_ms).then_some(feed)
    }
}

impl OpenFeed {
    fn send(&mut self, feed: Feed) {
        if self.interrupted && self.sender.capacity() > FEED_CAPACITY / 2 {
            self.interrupted = false;
        }
        if self.interrupted {
            return;
        }
        // Only this sends, and receiving only makes room: what capacity() says holds until the next line.
        if self.sender.capacity() > 1 {
            let _ = self.sender.try_send(feed);
        } else {
            self.interrupt();
        }
    }

    fn interrupt(&mut self) {
        if !self.interrupted {
            self.interrupted = true;
            // Fails only if the node is gone: the last slot is free unless an `Interrupted` is in it.
            let _ = self.sender.try_send(Feed::Interrupted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listening() -> (Presence, mpsc::Receiver<Feed>, AppKey) {
        let (app, node) = (AppKey::parse("demo").unwrap(), NodeName("n".into()));
        let mut presence = Presence::default();
        let receiver = presence.open_feed(&node);
        presence.subscribe(&app);
        presence.lease(&app, &node, 100);
        (presence, receiver, app)
    }

    fn number(feed: &Feed) -> Option<usize> {
        match feed {
            Feed::Published(_, raw) => Some(std::str::from_utf8(raw).unwrap().parse().unwrap()),
            Feed::Interrupted => None,
        }
    }

    fn publish(presence: &mut Presence, app: &AppKey, number: usize) {
        presence.publish(app, &Arc::from(number.to_string().into_bytes()), 0);
    }

    #[test]
    fn an_overflow_is_told_once_and_in_its_place() {
        let (mut presence, mut receiver, app) = listening();
        for i in 0..FEED_CAPACITY + 10 {
            publish(&mut presence, &app, i);
        }
        for i in 0..FEED_CAPACITY / 4 {
            assert_eq!(number(&receiver.try_recv().unwrap()), Some(i));
        }
        publish(&mut presence, &app, 900_001);
        for i in FEED_CAPACITY / 4..FEED_CAPACITY {
            assert_eq!(number(&receiver.try_recv().unwrap()), Some(i));
        }
        // What was dropped before and after the first receive is covered by the one Interrupted, then all goes on.
        publish(&mut presence, &app, 900_002);
        assert_eq!(number(&receiver.try_recv().unwrap()), None);
        assert_eq!(number(&receiver.try_recv().unwrap()), Some(900_002));
        assert!(receiver.try_recv().is_err());
    }

    #[test]
    fn nothing_is_dropped_without_an_interrupted_after_it() {
        let (mut presence, mut receiver, app) = listening();
        let (mut sent, mut random) = (0, fastrand::Rng::with_seed(7));
        let mut seen = 0;
        for _ in 0..400 {
            for _ in 0..random.usize(..600) {
                publish(&mut presence, &app, sent);
                sent += 1;
            }
            for _ in 0..random.usize(..600) {
                let Ok(feed) = receiver.try_recv() else { break };
                match number(&feed) {
                    Some(number) => {
                        assert!(number <= seen, "a gap that nobody was told of");
                        seen = seen.max(number + 1);
                    }
                    // The node reads the log up to now.
                    None => seen = sent,
                }
            }
        }
    }

    #[test]
    fn only_live_leases_count_and_only_a_subscribed_feed_is_reached() {
        let (mut presence, receiver, app) = listening();
        let other = NodeName("m".into());
        presence.lease(&app, &other, 50);
        assert_eq!(presence.audience(&app, 49), (2, 1));
        assert_eq!(presence.audience(&app, 50), (1, 1));
        assert_eq!(presence.audience(&app, 100), (0, 0));
        presence.unsubscribe(&app);
        assert_eq!(presence.audience(&app, 49), (2, 0));
        presence.subscribe(&app);
        drop(receiver);
        assert_eq!(presence.audience(&app, 49), (2, 0));
        presence.leave(&app, &other);
        assert_eq!(presence.audience(&app, 49), (1, 0));
    }
}
