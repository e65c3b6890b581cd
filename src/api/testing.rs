//! A small ledger in memory and signed calls, for the tests of the API.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::http::{Request as HttpRequest, Response};
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tower_service::Service;
use uuid::Uuid;

use super::signature::check_sum;
use super::submit::{DirectSubmitter, Submitter};
use super::{Api, ApiSettings, router};
use crate::broadcast::BroadcastId;
use crate::broadcast::app::{App, AppKey, Directory};
use crate::broadcast::envelope::{self, Envelope};
use crate::broadcast::quota::Limits;
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::{Accepted, Decision, Limit, Refusal};
use crate::ledger::{Answer, Feed, Kind, Ledger, LedgerError, NodeName, Recalled, Renewal, Snapshot};
use crate::metrics::Metrics;

pub const START: BroadcastId = 1_764_000_000_000_000;

/// Decides as the real ones do, as far as the API can see.
#[derive(Default)]
pub struct FakeLedger {
    pub down: AtomicBool,
    /// It cannot say what was used.
    pub forgetful: AtomicBool,
    /// This many calls are accepted, but answered as if they had been lost.
    pub lose_answers: AtomicU32,
    /// Signatures are compared while nobody holds this for writing.
    pub uses: tokio::sync::RwLock<()>,
    /// Deletions wait while this is held for writing.
    pub recalls: tokio::sync::RwLock<()>,
    pub submissions: Mutex<Vec<Submission>>,
    verdicts: Mutex<HashMap<String, (String, Accepted)>>,
    log: Mutex<Vec<Envelope>>,
    used: Mutex<HashSet<String>>,
}

impl FakeLedger {
    fn check(&self) -> Result<(), LedgerError> {
        if self.down.load(Ordering::SeqCst) { Err(LedgerError::Unavailable("down".to_owned())) } else { Ok(()) }
    }

    fn decide(&self, submission: &Submission) -> Result<Decision, LedgerError> {
        self.check()?;
        self.submissions.lock().unwrap().push(submission.clone());
        let request = &submission.request;
        let mut verdicts = self.verdicts.lock().unwrap();
        if let Some((hash, accepted)) = verdicts.get(&request.id) {
            return Ok(if *hash == request.content_hash() {
                Decision::Accepted(Accepted { repeated: true, ..*accepted })
            } else {
                Decision::Conflict
            });
        }
        if verdicts.len() as u32 >= submission.limits.per_minute {
            return Ok(Decision::Refused(Refusal { limit: Limit::Minute, retry_after: 37 }));
        }
        let id = START + verdicts.len() as u64;
        let (time_ms, expires_ms) = (START / 1000, request.ttl_ms.map_or(0, |ttl| START / 1000 + ttl));
        let accepted = Accepted { id, time_ms, expires_ms, targeted: 1, reached: 1, repeated: false };
        verdicts.insert(request.id.clone(), (request.content_hash(), accepted));
        let text = envelope::broadcast(id, 0, time_ms, expires_ms, &envelope::tail(request));
        self.log.lock().unwrap().push(Envelope::read(text.as_bytes()).unwrap());
        if self.lose_answers.load(Ordering::SeqCst) > 0 {
            self.lose_answers.fetch_sub(1, Ordering::SeqCst);
            return Err(LedgerError::Unavailable("the answer was lost".to_owned()));
        }
        Ok(Decision::Accepted(accepted))
    }
}

impl Ledger for FakeLedger {
    fn accept<'a>(&'a self, batch: &'a [Submission]) -> BoxFuture<'a, Vec<Result<Decision, LedgerError>>> {
        Box::pin(async { batch.iter().map(|submission| self.decide(submission)).collect() })
    }

    fn recall<'a>(&'a self, _: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Recalled>> {
        Box::pin(async move {
            self.check()?;
            let _open = self.recalls.read().await;
            let mut log = self.log.lock().unwrap();
            let position = log.iter().position(|envelope| envelope.id == id);
            Ok(position.map(|position| {
                log.remove(position);
                Recalled { recall_id: START * 2, targeted: 1, reached: 1 }
            }))
        })
    }

    fn find<'a>(&'a self, _: &'a AppKey, id: BroadcastId) -> Answer<'a, Option<Envelope>> {
        Box::pin(async move {
            self.check()?;
            Ok(self.log.lock().unwrap().iter().find(|envelope| envelope.id == id).cloned())
        })
    }

    fn list<'a>(&'a self, _: &'a AppKey, before: BroadcastId, limit: usize, kind: Kind) -> Answer<'a, Vec<Envelope>> {
        Box::pin(async move {
            self.check()?;
            let wanted = |envelope: &&Envelope| match kind {
                Kind::All => true,
                Kind::Retained => envelope.expires_ms != 0,
                Kind::OnlineOnly => envelope.expires_ms == 0,
            };
            let log = self.log.lock().unwrap();
            let below = log.iter().rev().filter(|envelope| before == 0 || envelope.id < before);
            Ok(below.filter(wanted).take(limit).cloned().collect())
        })
    }

    fn first_use<'a>(&'a self, app: &'a AppKey, mark: &'a str, _: Duration) -> Answer<'a, bool> {
        Box::pin(async move {
            if self.forgetful.load(Ordering::SeqCst) {
                return Err(LedgerError::Unavailable("down".to_owned()));
            }
            let _open = self.uses.read().await;
            Ok(self.used.lock().unwrap().insert(format!("{app} {mark}")))
        })
    }

    fn join<'a>(&'a self, _: &'a AppKey, _: &'a NodeName, _: Duration, _: BroadcastId) -> Answer<'a, Snapshot> {
        unimplemented!("a node's")
    }

    fn renew<'a>(
        &'a self,
        _: &'a [AppKey],
        _: &'a NodeName,
        _: Duration,
    ) -> BoxFuture<'a, Vec<Result<Renewal, LedgerError>>> {
        unimplemented!("a node's")
    }

    fn leave<'a>(&'a self, _: &'a AppKey, _: &'a NodeName) -> Answer<'a, ()> {
        unimplemented!("a node's")
    }

    fn restore<'a>(
        &'a self,
        _: &'a AppKey,
        _: BroadcastId,
        _: &'a [crate::ledger::Stored],
        _: &'a [BroadcastId],
    ) -> Answer<'a, u32> {
        unimplemented!("a node's")
    }

    fn open_feed(&self, _: &NodeName) -> mpsc::Receiver<Feed> {
        unimplemented!("a node's")
    }

    fn subscribe<'a>(&'a self, _: &'a AppKey) -> Answer<'a, ()> {
        unimplemented!("a node's")
    }

    fn unsubscribe<'a>(&'a self, _: &'a AppKey) -> Answer<'a, ()> {
        unimplemented!("a node's")
    }

    fn health(&self) -> watch::Receiver<Result<(), String>> {
        watch::channel(Ok(())).1
    }
}

pub fn settings() -> ApiSettings {
    ApiSettings {
        reply_timeout_ms: 300,
        max_in_flight: 10,
        max_in_flight_per_app: 10,
        max_body_bytes: 65_536,
        checksum_window_seconds: 300,
    }
}

/// The routes over a fake ledger, with the apps `demo`, and `quiet` for which broadcasts are off.
pub struct Bench {
    pub ledger: Arc<FakeLedger>,
    pub metrics: Metrics,
    pub router: Router,
}

impl Bench {
    pub fn new(settings: ApiSettings) -> Self {
        let app = |key: &str, broadcast| App {
            key: AppKey::parse(key).unwrap(),
            secret: format!("{key}-secret").into(),
            broadcast,
            limits: Limits::default(),
        };
        let directory = Directory::new([app("demo", true), app("quiet", false)]).unwrap();
        let ledger = Arc::new(FakeLedger::default());
        let metrics = Metrics::new().unwrap();
        let direct = DirectSubmitter::new(ledger.clone(), metrics.clone(), settings.reply_timeout());
        let api = Api::new(settings, directory, ledger.clone(), Submitter::Direct(direct), metrics.clone());
        Self { ledger, metrics, router: router(Arc::new(api)) }
    }

    /// Sends a request and gives back the JSON; the HTTP status must be 200.
    pub async fn send(&self, request: HttpRequest<Body>) -> Value {
        let response = self.raw(request).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json; charset=utf-8");
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    pub async fn raw(&self, request: HttpRequest<Body>) -> Response<Body> {
        self.router.clone().call(request).await.unwrap()
    }

    /// A signed call with these parameters.
    pub async fn call(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        self.send(signed(path, "demo", serde_urlencoded::to_string(parameters).unwrap())).await
    }
}

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A call of `app`, signed with its secret and a nonce of its own.
pub fn signed(path: &str, app: &str, body: impl Into<Body>) -> HttpRequest<Body> {
    let (nonce, cur_time) = (Uuid::new_v4().to_string(), now_s().to_string());
    let sum = check_sum(&format!("{app}-secret").into(), &nonce, &cur_time);
    HttpRequest::post(path)
        .header("Content-Type", "application/x-www-form-urlencoded;charset=utf-8")
        .header("AppKey", app)
        .header("Nonce", nonce)
        .header("CurTime", cur_time)
        .header("CheckSum", sum)
        .body(body.into())
        .unwrap()
}
