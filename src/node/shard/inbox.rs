//! A shard's inbox: a bounded queue, and a way to wake the shard's poll.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mio::{Registry, Token, Waker};
use tokio::sync::mpsc;

use crate::node::entry::Entry;
use crate::node::login::AppIndex;
use crate::node::timeline::Timeline;

/// How many messages may wait. When it is full the sender waits: the presence task stops taking from its feed (which then says that it was interrupted, and the log is read).
const CAPACITY: usize = 4096;

/// What a shard is told.
pub enum Message {
    /// The app's timeline; replaces an older copy.
    Open {
        /// The app.
        app: AppIndex,
        /// The shard's own copy.
        timeline: Box<Timeline>,
    },
    /// What is new in an app's timeline, ids ascending.
    Append {
        /// The app.
        app: AppIndex,
        /// The entries.
        entries: Arc<[Arc<Entry>]>,
    },
    /// The app is not kept up to date any more.
    Close {
        /// The app.
        app: AppIndex,
    },
    /// Close all sessions, evenly until then.
    Drain {
        /// The deadline.
        until: Instant,
    },
}

/// The sending side.
#[derive(Clone)]
pub struct Sender {
    sender: mpsc::Sender<Message>,
    bell: Bell,
}

/// Wakes the shard.
#[derive(Clone)]
pub struct Bell {
    waker: Arc<Waker>,
    /// Whether it has rung and the shard has not looked yet: then it need not ring again.
    rung: Arc<AtomicBool>,
}

/// The shard's side.
pub struct Inbox {
    receiver: mpsc::Receiver<Message>,
    rung: Arc<AtomicBool>,
}

/// Makes an inbox whose bell is the event `token` of the poll.
///
/// # Errors
/// If the system has no descriptor for it.
pub fn inbox(registry: &Registry, token: Token) -> io::Result<(Sender, Inbox)> {
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let rung = Arc::new(AtomicBool::new(false));
    let bell = Bell { waker: Arc::new(Waker::new(registry, token)?), rung: rung.clone() };
    Ok((Sender { sender, bell }, Inbox { receiver, rung }))
}

impl Bell {
    /// Wakes the shard, if it is not awake for this already.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel)
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "a shard cannot be woken");
        }
    }
}

impl Sender {
    /// Sends, waiting for room. A shard that has ended takes nothing; its node is ending too.
    pub async fn send(&self, message: Message) {
        if self.sender.send(message).await.is_ok() {
            self.bell.ring();
        }
    }

    /// The bell alone.
    #[must_use]
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }
}

impl Inbox {
    /// Says that the bell was heard: what is sent from now on rings again. Call it before taking the messages.
    pub fn heard(&self) {
        // A swap, so that what was pushed before the last ring is seen.
        self.rung.swap(false, Ordering::AcqRel);
    }

    /// The next message, if there is one.
    pub fn next(&mut self) -> Option<Message> {
        self.receiver.try_recv().ok()
    }
}
