//! HTTP in: the NIM-compatible server API, and the console page.
//!
//! The path of a call: [`serve`] (connection) → [`nim`] (which call, its parameters) → [`signature`] (who) → [`submit`]
//! (to the worker over AMQP, or straight to the ledger) or the ledger (queries, deletion).

pub mod amqp;
mod body;
mod console;
pub mod form;
mod history;
pub mod message;
pub mod nim;
pub mod serve;
pub mod signature;
pub mod submit;
#[cfg(test)]
mod testing;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::{any, get, post};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::broadcast::app::{App, AppKey, Directory};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use submit::Submitter;

/// Section `[api]`.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiSettings {
    /// How long a call waits for the verdict, in milliseconds; then it answers that the outcome is unknown.
    pub reply_timeout_ms: u64,
    /// Calls under way at once; a further one is answered 503 at once, it does not wait.
    pub max_in_flight: usize,
    /// Calls of one app under way at once, likewise: so many of its requests may stand in the queue before another app's,
    /// and a flood leaves the others their places.
    pub max_in_flight_per_app: usize,
    /// The largest body that is read, in bytes.
    pub max_body_bytes: usize,
    /// How far `CurTime` may be from this server's clock, in seconds, either way.
    pub checksum_window_seconds: u64,
}

impl ApiSettings {
    /// Checks the ranges.
    ///
    /// # Errors
    /// A sentence.
    pub fn validate(&self) -> Result<(), String> {
        if self.reply_timeout_ms == 0 || self.max_in_flight == 0 || self.checksum_window_seconds == 0 {
            return Err("api.reply_timeout_ms, api.max_in_flight and api.checksum_window_seconds are at least 1".into());
        }
        if self.max_in_flight_per_app == 0 {
            return Err("api.max_in_flight_per_app is at least 1".into());
        }
        // A body of 4096 characters of four bytes each, percent-encoded.
        if self.max_body_bytes < 50_000 {
            return Err("api.max_body_bytes is at least 50000: the largest broadcast must fit".into());
        }
        Ok(())
    }

    /// [`ApiSettings::reply_timeout_ms`] as a duration.
    #[must_use]
    pub const fn reply_timeout(&self) -> Duration {
        Duration::from_millis(self.reply_timeout_ms)
    }
}

/// What the calls need.
pub struct Api {
    settings: ApiSettings,
    directory: Directory,
    ledger: Arc<dyn Ledger>,
    submitter: Submitter,
    metrics: Metrics,
    /// One permit a call under way; none left is answered 503.
    in_flight: Arc<Semaphore>,
    /// The same for each app by itself.
    shares: HashMap<AppKey, Arc<Semaphore>>,
}

impl Api {
    /// Puts the parts together. `ledger`: for the queries, the deletion and the signatures that were used; sending goes
    /// through `submitter`.
    #[must_use]
    pub fn new(
        settings: ApiSettings,
        directory: Directory,
        ledger: Arc<dyn Ledger>,
        submitter: Submitter,
        metrics: Metrics,
    ) -> Self {
        let in_flight = Arc::new(Semaphore::new(settings.max_in_flight.min(Semaphore::MAX_PERMITS)));
        let share = || Arc::new(Semaphore::new(settings.max_in_flight_per_app.min(Semaphore::MAX_PERMITS)));
        let shares = directory.iter().map(|app| (app.key.clone(), share())).collect();
        Self { settings, directory, ledger, submitter, metrics, in_flight, shares }
    }

    /// A place for one more call of this app; `None` if the app, or all together, have as many under way as they may.
    fn place(&self, app: &App) -> Option<Place> {
        let share = Arc::clone(self.shares.get(&app.key)?).try_acquire_owned().ok()?;
        let any = Arc::clone(&self.in_flight).try_acquire_owned().ok()?;
        Some(Place { _share: share, _any: any })
    }
}

/// A call under way; dropped, it is over.
struct Place {
    _share: OwnedSemaphorePermit,
    _any: OwnedSemaphorePermit,
}

/// The routes: the calls under `/nimserver`, and the console at `/`. Serve it with [`serve::serve`] or
/// [`serve::serve_handed_over`].
pub fn router(api: Arc<Api>) -> Router {
    let mut router = Router::new().route("/", get(console::page)).route(nim::LIVENESS, any(nim::liveness));
    for call in nim::Call::ALL {
        let handler = move |state: axum::extract::State<Arc<Api>>, request: axum::extract::Request| {
            nim::call(state, call, request)
        };
        router = router.route(call.path(), post(handler).fallback(nim::not_post));
    }
    router.route("/nimserver/{*path}", any(nim::no_such_call)).with_state(api)
}
