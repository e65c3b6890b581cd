//! The supervised connection to Redis: always one that was probed to be a master, with the generation of its data.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::connect::{Connection, RedisSettings, describe, probe};
use super::scripts::Scripts;
use super::sentinels::{Address, Sentinels};
use crate::backoff::Backoff;
use crate::ledger::{Generation, LedgerError};

/// How often a connection is probed. Nothing else would notice a server that is frozen, unreachable or demoted.
const PROBE_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) generation: Generation,
    /// Of this generation.
    pub(super) scripts: Arc<Scripts>,
    /// Where the Sentinels say that the master is.
    pub(super) master: Option<Address>,
}

pub(super) type State = Result<Live, String>;

/// Handle to the supervisor; the connection is rebuilt behind it.
pub(super) struct Link {
    state: watch::Receiver<State>,
    suspect: Arc<Notify>,
    /// A std Mutex, not tokio's: never held across an await.
    pretended: Mutex<Option<Generation>>,
    _stop: tokio_util::sync::DropGuard,
}

impl Link {
    /// Starts connecting. `health` follows the state.
    pub(super) fn start(settings: RedisSettings, health: watch::Sender<Result<(), String>>) -> Self {
        let (sender, state) = watch::channel(Err("not connected yet".to_owned()));
        let suspect = Arc::new(Notify::new());
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(supervise(settings, sender, health, suspect.clone())));
        Self { state, suspect, pretended: Mutex::default(), _stop: stop.drop_guard() }
    }

    /// The connection, if there is one now.
    pub(super) fn get(&self) -> Result<Live, LedgerError> {
        let mut live = self.state.borrow().clone().map_err(LedgerError::Unavailable)?;
        if let Some(generation) = &*self.pretended.lock().unwrap_or_else(PoisonError::into_inner) {
            live.generation = generation.clone();
        }
        Ok(live)
    }

    /// Follows the connection as it is rebuilt.
    pub(super) fn watch(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Tests only: pretends that the data has had another life.
    pub(super) fn set_generation(&self, generation: Generation) {
        *self.pretended.lock().unwrap_or_else(PoisonError::into_inner) = Some(generation);
    }

    /// Has the connection probed at once: an operation on it failed.
    pub(super) fn suspect(&self) {
        self.suspect.notify_one();
    }
}

async fn supervise(
    settings: RedisSettings,
    state: watch::Sender<State>,
    health: watch::Sender<Result<(), String>>,
    suspect: Arc<Notify>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut sentinels = None;
    loop {
        let reason = session(&settings, &mut sentinels, &state, &health, &suspect, &mut backoff).await;
        if health.borrow().is_ok() || state.borrow().is_ok() {
            tracing::warn!(reason, "Redis is unavailable; requests are held until it is back");
        }
        let _ = state.send_replace(Err(reason.clone()));
        let _ = health.send_replace(Err(reason));
        backoff.wait().await;
    }
}

/// One connection, for as long as it leads to the master; returns why it ended.
async fn session(
    settings: &RedisSettings,
    sentinels: &mut Option<Sentinels>,
    state: &watch::Sender<State>,
    health: &watch::Sender<Result<(), String>>,
    suspect: &Notify,
    backoff: &mut Backoff,
) -> String {
    if sentinels.is_none() {
        *sentinels = match settings.sentinels() {
            Ok(sentinels) => sentinels,
            Err(error) => return describe(&error),
        };
    }
    let master = match sentinels {
        None => None,
        Some(sentinels) => match sentinels.master().await {
            Ok(master) => Some(master),
            Err(reason) => return reason,
        },
    };
    let no_push = None::<tokio::sync::mpsc::UnboundedSender<redis::PushInfo>>;
    let mut connection = match settings.open(no_push, master.as_ref()).await {
        Ok(connection) => connection,
        Err(error) => return settings.refused(&error),
    };
    loop {
        // Together: a Sentinel that does not answer must not delay what the server itself would tell.
        let asked = async {
            match sentinels {
                Some(sentinels) => sentinels.master().await.ok(),
                None => None,
            }
        };
        let (probed, named) = tokio::join!(probe(&mut connection), asked);
        let generation = match probed {
            Ok(generation) => generation,
            Err(reason) => return reason,
        };
        // A master that is cut off still says that it is one. While no Sentinel answers, it is believed.
        if named.is_some() && named != master {
            return "the Sentinels name another master".to_owned();
        }
        let known = matches!(&*state.borrow(), Ok(live) if live.generation == generation);
        if !known {
            tracing::info!(generation = %generation.0, "connected to Redis");
            let scripts = Arc::new(Scripts::new(settings.test_clock_key.as_deref(), &generation));
            let live = Live { connection: connection.clone(), generation, scripts, master: master.clone() };
            let _ = state.send_replace(Ok(live));
            let _ = health.send_replace(Ok(()));
        }
        backoff.reset();
        tokio::select! {
            () = tokio::time::sleep(PROBE_EVERY) => {}
            () = suspect.notified() => {}
        }
    }
}
