//! What the tests have in common.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::broadcast::app::AppKey;
use crate::broadcast::platform::Platforms;
use crate::broadcast::quota::Limits;
use crate::broadcast::request::{Request, Submission};
use crate::broadcast::verdict::{Accepted, Decision};
use crate::ledger::embedded::Clock;
use crate::ledger::{Feed, LedgerError, LedgerSettings, NodeName, Stored};

pub const NOW_US: u64 = 1_764_000_000_000_000;
pub const SETTINGS: LedgerSettings = LedgerSettings { log_length: 1000, log_hours: 168 };
pub const LEASE: Duration = Duration::from_secs(1_000_000);

pub fn node() -> NodeName {
    NodeName("node".into())
}

/// A clock that stands still until it is moved.
pub fn clock() -> (Arc<AtomicU64>, Clock) {
    let time = Arc::new(AtomicU64::new(NOW_US));
    (time.clone(), Arc::new(move || time.load(Ordering::SeqCst)))
}

pub fn app(key: &str) -> AppKey {
    AppKey::parse(key).unwrap()
}

pub fn submission(key: &str, request_id: &str, retained: bool) -> Submission {
    Submission {
        request: Request {
            id: request_id.to_owned(),
            app: app(key),
            from: String::new(),
            body: format!("body of {request_id}"),
            ttl_ms: retained.then_some(1_000_000_000),
            targets: Platforms::ALL,
            dedupe_ms: 1_000_000,
        },
        limits: Limits { per_minute: u32::MAX, per_day: u32::MAX },
    }
}

pub fn accepted(decision: Result<Decision, LedgerError>) -> Accepted {
    match decision {
        Ok(Decision::Accepted(accepted)) => accepted,
        other => panic!("{other:?}"),
    }
}

pub fn ids(stored: &[Stored]) -> Vec<u64> {
    stored.iter().map(|entry| entry.envelope.id).collect()
}

/// Longer than any of this takes; only a failing test waits for it.
const LONG: Duration = Duration::from_secs(30);

pub async fn until(condition: impl Fn() -> bool) {
    let come = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, come).await.expect("it never comes");
}

pub async fn next(feed: &mut mpsc::Receiver<Feed>) -> Option<Feed> {
    timeout(LONG, feed.recv()).await.expect("nothing is published")
}

/// Waits for health, or for the want of it.
pub async fn reaches(health: &mut watch::Receiver<Result<(), String>>, well: bool) -> Result<(), String> {
    timeout(LONG, health.wait_for(|health| health.is_ok() == well)).await.expect("it stays as it is").unwrap().clone()
}
