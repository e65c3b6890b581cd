//! The presence task's calls to the ledger, as futures that own what they need. Each is bounded in time, and tells its outcome.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use crate::broadcast::BroadcastId;
use crate::broadcast::app::AppKey;
use crate::failpoint;
use crate::ledger::{Generation, Ledger, LedgerError, NodeName, Renewal, Snapshot, Stored};
use crate::node::login::AppIndex;

/// What became of a call.
pub enum Outcome {
    /// The app's state, read when it was opened or when something was missing.
    Read {
        /// The app.
        app: AppIndex,
        /// Which opening of it: see [`App::incarnation`](super::app::App).
        incarnation: u64,
        /// When the ledger was asked.
        asked: Instant,
        /// Its state.
        result: Result<Snapshot, LedgerError>,
    },
    /// Leases were renewed; each with the newest id that the node knew when it asked.
    Renewed {
        /// In the order of the results.
        apps: Vec<(AppIndex, BroadcastId)>,
        /// When the ledger was asked.
        asked: Instant,
        /// The ledger's answers.
        results: Vec<Result<Renewal, LedgerError>>,
    },
    /// A renewal named an id that the node did not know, and time enough has passed for it to arrive by itself.
    Overdue {
        /// The app.
        app: AppIndex,
        /// The id.
        head: BroadcastId,
        /// Where the node was when the waiting began.
        since: Position,
    },
    /// What the ledger lost was written back.
    Restored {
        /// The app.
        app: AppIndex,
        /// The life of the ledger that has it now.
        generation: Generation,
        /// How many were missing there.
        result: Result<u32, LedgerError>,
    },
    /// The lease was given up.
    Left {
        /// The app.
        app: AppIndex,
        /// An error only means that the lease runs out by itself.
        result: Result<(), LedgerError>,
    },
}

/// How far the node had come.
#[derive(Debug, Clone, Copy)]
pub struct Position {
    /// The newest id of the app that it knew.
    pub last: BroadcastId,
    /// How many messages it had taken from the feed.
    pub taken: u64,
}

/// A call under way.
pub type Operation = BoxFuture<'static, Outcome>;

/// The app that a call is for.
pub struct Wanted {
    pub index: AppIndex,
    pub incarnation: u64,
    pub key: AppKey,
}

/// Makes the calls.
#[derive(Clone)]
pub struct Caller {
    pub ledger: Arc<dyn Ledger>,
    pub node: NodeName,
    pub lease: Duration,
}

impl Caller {
    async fn bounded<T>(&self, call: impl Future<Output = Result<T, LedgerError>>) -> Result<T, LedgerError> {
        let late = || LedgerError::Unavailable(format!("no answer within {} s", self.lease.as_secs()));
        tokio::time::timeout(self.lease, call).await.unwrap_or_else(|_| Err(late()))
    }

    /// Subscribes and then takes the lease and reads the state after `after`, once `delay` has passed. `again`: the present
    /// subscription seems to be dead, and is ended first.
    pub fn open(&self, app: Wanted, after: BroadcastId, again: bool, delay: Duration) -> Operation {
        let caller = self.clone();
        Box::pin(async move {
            let Wanted { index, incarnation, key } = app;
            tokio::time::sleep(delay).await;
            let mut asked = Instant::now();
            let result = caller.bounded(async {
                if again {
                    caller.ledger.unsubscribe(&key).await?;
                }
                caller.ledger.subscribe(&key).await?;
                failpoint::reached("node::after-subscribe", key.as_str());
                asked = Instant::now();
                let snapshot = caller.ledger.join(&key, &caller.node, caller.lease, after).await;
                // Skip: not yet. Everything else goes on meanwhile.
                while failpoint::reached("node::after-snapshot", key.as_str()) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                snapshot
            });
            let result = result.await;
            Outcome::Read { app: index, incarnation, asked, result }
        })
    }

    /// Reads the state after `after`.
    pub fn read(&self, app: Wanted, after: BroadcastId, delay: Duration) -> Operation {
        let caller = self.clone();
        Box::pin(async move {
            let Wanted { index, incarnation, key } = app;
            tokio::time::sleep(delay).await;
            let asked = Instant::now();
            let result = caller.bounded(caller.ledger.join(&key, &caller.node, caller.lease, after)).await;
            Outcome::Read { app: index, incarnation, asked, result }
        })
    }

    /// Renews all leases.
    pub fn renew(&self, apps: Vec<(AppIndex, BroadcastId)>, keys: Vec<AppKey>) -> Operation {
        let caller = self.clone();
        Box::pin(async move {
            let asked = Instant::now();
            let call = async { Ok(caller.ledger.renew(&keys, &caller.node, caller.lease).await) };
            let results = match caller.bounded(call).await {
                Ok(results) => results,
                Err(error) => keys.iter().map(|_| Err(error.clone())).collect(),
            };
            Outcome::Renewed { apps, asked, results }
        })
    }

    /// Waits a moment.
    pub fn wait_for(app: AppIndex, head: BroadcastId, since: Position, moment: Duration) -> Operation {
        Box::pin(async move {
            tokio::time::sleep(moment).await;
            Outcome::Overdue { app, head, since }
        })
    }

    /// Writes back what the ledger may have lost.
    pub fn restore(
        &self,
        app: AppIndex,
        key: AppKey,
        generation: Generation,
        head: BroadcastId,
        retained: Vec<Stored>,
        recalled: Vec<BroadcastId>,
    ) -> Operation {
        let caller = self.clone();
        Box::pin(async move {
            let result = caller.bounded(caller.ledger.restore(&key, head, &retained, &recalled)).await;
            Outcome::Restored { app, generation, result }
        })
    }

    /// Gives the lease up and ends the subscription.
    pub fn leave(&self, app: AppIndex, key: AppKey) -> Operation {
        let caller = self.clone();
        Box::pin(async move {
            let result = caller.bounded(async {
                caller.ledger.leave(&key, &caller.node).await?;
                caller.ledger.unsubscribe(&key).await
            });
            Outcome::Left { app, result: result.await }
        })
    }
}
