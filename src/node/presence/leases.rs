//! Leases: renewed, compared with what the node knows, given up.

use std::time::{Duration, Instant};

use super::Presence;
use super::operations::{Caller, Position};
use crate::broadcast::BroadcastId;
use crate::ledger::{FEED_CAPACITY, Generation, LedgerError, Renewal};
use crate::node::login::AppIndex;
use crate::node::shard::Message;

/// How long an id that a renewal names may still be on its way by the subscription.
const UNDER_WAY: Duration = Duration::from_millis(50);

impl Presence {
    /// Renews all leases in one call; if one is under way, once more after it.
    pub(super) fn renew(&mut self) {
        if self.is_renewing {
            self.renew_again = true;
            return;
        }
        let open = self.apps.iter().filter(|(_, app)| app.timeline.is_some() && app.closing.is_none());
        let (apps, keys): (Vec<_>, Vec<_>) = open.map(|(index, app)| ((*index, app.last()), app.key.clone())).unzip();
        self.tell_readiness();
        if self.apps.is_empty() {
            // Nothing is asked of the ledger any more, so nothing is known to be wrong with it.
            self.trouble_over();
        }
        if !apps.is_empty() {
            self.is_renewing = true;
            self.operations.push(self.caller.renew(apps, keys));
        }
    }

    /// Compares an app's position with the ledger's. `last`: the node's when it asked.
    pub(super) fn take_renewal(&mut self, index: AppIndex, last: BroadcastId, renewal: &Renewal) {
        let Some(app) = self.apps.get(&index) else { return };
        let is_another = app.generation.as_ref() != Some(&renewal.generation);
        if is_another || renewal.head < last {
            // First what the ledger has and the node has not; then the other way round.
            tracing::warn!(app = %app.key, head = renewal.head, last, "the ledger may have lost broadcasts");
            self.forget_generation(index);
            self.read(index);
        } else if renewal.head > app.last() {
            let since = Position { last: app.last(), taken: self.taken };
            self.operations.push(Caller::wait_for(index, renewal.head, since, UNDER_WAY));
        }
    }

    fn forget_generation(&mut self, index: AppIndex) {
        if let Some(app) = self.apps.get_mut(&index) {
            app.generation = None;
        }
    }

    /// A renewal named `head`, and it has not arrived: the subscription may be dead, and is made anew. Not while it may still
    /// be in the feed: where the log has let it go, reading on past what waits there would lose it. `waiting`: whether
    /// anything does.
    pub(super) fn take_overdue(&mut self, index: AppIndex, head: BroadcastId, since: Position, waiting: bool) {
        let Some(app) = self.apps.get_mut(&index) else { return };
        if app.last() >= head || app.is_reading || app.closing.is_some() {
            return;
        }
        let has_moved = app.last() > since.last;
        // What was in the feed at that time has been taken after so many, though others never let it become empty.
        if has_moved || waiting && self.taken - since.taken < FEED_CAPACITY as u64 {
            let since = if has_moved { Position { last: app.last(), taken: self.taken } } else { since };
            self.operations.push(Caller::wait_for(index, head, since, UNDER_WAY));
            return;
        }
        tracing::warn!(app = %app.key, head, last = app.last(), "the last broadcasts did not arrive: reading the log");
        app.start_reading();
        app.subscribe_again = true;
        self.shared.metrics.backfills.inc();
        self.operations.push(self.caller.open(app.wanted(index), app.last(), true, Duration::ZERO));
    }

    /// Writes back what the ledger may have lost, if this is another life of it than the one that had everything.
    pub(super) fn restore_if_lost(&mut self, index: AppIndex, generation: &Generation) {
        let now_ms = self.shared.clock.now_ms();
        let Some(app) = self.apps.get_mut(&index) else { return };
        if app.generation.as_ref() == Some(generation) || app.is_restoring {
            return;
        }
        app.is_restoring = true;
        let (retained, recalled) = app.holdings(now_ms);
        let operation = self.caller.restore(index, app.key.clone(), generation.clone(), app.last(), retained, recalled);
        self.operations.push(operation);
    }

    pub(super) fn take_restored(&mut self, index: AppIndex, generation: Generation, result: Result<u32, LedgerError>) {
        let Some(app) = self.apps.get_mut(&index) else { return };
        app.is_restoring = false;
        match result {
            Ok(missing) => {
                app.generation = Some(generation);
                self.shared.metrics.restored.inc_by(u64::from(missing));
                tracing::warn!(app = %app.key, missing, "retained broadcasts written back");
            }
            // The next renewal notices again.
            Err(error) => self.note_trouble(index, &error),
        }
    }

    /// Closes the apps that have had no session for long enough.
    pub(super) async fn close_idle(&mut self) {
        let linger = self.shared.settings.linger();
        let mut idle = Vec::new();
        for (index, app) in &mut self.apps {
            if self.shared.desk.sessions(*index) > 0 || app.closing.is_some() || app.is_reading || app.is_restoring {
                app.idle_since = None;
            } else if app.idle_since.get_or_insert_with(Instant::now).elapsed() >= linger {
                app.closing = Some(false);
                idle.push((*index, app.key.clone()));
            }
        }
        for (index, key) in idle {
            for shard in &self.shards {
                shard.send(Message::Close { app: index }).await;
            }
            self.operations.push(self.caller.leave(index, key));
        }
    }

    pub(super) fn take_left(&mut self, index: AppIndex, result: Result<(), LedgerError>) {
        let Some(app) = self.apps.remove(&index) else { return };
        self.shared.metrics.apps.dec();
        match result {
            Ok(()) => tracing::debug!(app = %app.key, "lease given up"),
            Err(error) => tracing::debug!(app = %app.key, %error, "lease left to run out"),
        }
        if app.closing == Some(true) {
            self.want(index);
        }
    }
}
