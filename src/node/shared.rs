//! What the node's parts share: settings, figures, and the desk between the shards and the presence task.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::HttpHandOff;
use super::caps::Caps;
use super::clock::LedgerClock;
use super::login::{AppIndex, Apps};
use super::settings::NodeSettings;
use crate::metrics::Metrics;

/// Shared by the shards and the presence task.
pub struct Shared {
    /// The section `[node]`.
    pub settings: NodeSettings,
    /// The apps, numbered.
    pub apps: Apps,
    /// The ledger's time.
    pub clock: LedgerClock,
    /// All metrics.
    pub metrics: Metrics,
    /// Where other HTTP requests go, if anywhere.
    pub http: Option<HttpHandOff>,
    /// What the shards tell the presence task.
    pub desk: Desk,
    /// How many connections there are, and may be.
    pub caps: Arc<Caps>,
    /// Everything ends at once.
    pub stop: AtomicBool,
}

impl Shared {
    /// Of a node that nobody is connected to.
    #[cfg(test)]
    pub(super) fn for_tests(
        settings: NodeSettings,
        directory: &crate::broadcast::app::Directory,
        metrics: Metrics,
    ) -> Self {
        let apps = Apps::new(directory, true);
        Self {
            desk: Desk::new(apps.len(), settings.max_sessions_per_app),
            caps: Caps::new(settings.max_sessions, settings.max_sessions_per_address),
            settings,
            apps,
            clock: LedgerClock::new(),
            metrics,
            http: None,
            stop: AtomicBool::new(false),
        }
    }

    /// Whether everything ends at once.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Which apps the shards need, and how many sessions each has. Touched at login and at leaving only.
pub struct Desk {
    sessions: Vec<AtomicU32>,
    /// The most sessions of one app; 0: any number.
    most: u32,
    /// A std Mutex, not tokio's: held for a push or a take, never across an await. Each shard asks for an app once until
    /// it is opened, so it holds at most apps × shards.
    wanted: Mutex<Vec<AppIndex>>,
    notify: Notify,
}

impl Desk {
    /// A desk for so many apps, each with at most `most` sessions (0: any number).
    #[must_use]
    pub fn new(apps: usize, most: u32) -> Self {
        Self {
            most,
            sessions: (0..apps).map(|_| AtomicU32::new(0)).collect(),
            wanted: Mutex::new(Vec::new()),
            notify: Notify::new(),
        }
    }

    /// A device of the app logs in. Whether there is room for it; if so it counts until it has [`Desk::left`].
    #[must_use]
    pub fn arrive(&self, app: AppIndex) -> bool {
        let Some(count) = self.sessions.get(app as usize) else { return false };
        let most = if self.most == 0 { u32::MAX } else { self.most };
        let one_more = |count: u32| (count < most).then(|| count + 1);
        count.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// It has left.
    pub fn left(&self, app: AppIndex) {
        if let Some(count) = self.sessions.get(app as usize) {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// How many devices of the app are logged in.
    #[must_use]
    pub fn sessions(&self, app: AppIndex) -> u32 {
        self.sessions.get(app as usize).map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// A shard has sessions of this app and no timeline of it.
    pub fn want(&self, app: AppIndex) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).push(app);
        self.notify.notify_one();
    }

    /// Waits until apps are wanted, and takes them. May return none.
    pub async fn wanted(&self) -> Vec<AppIndex> {
        self.notify.notified().await;
        std::mem::take(&mut *self.wanted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
