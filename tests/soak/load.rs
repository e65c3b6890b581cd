//! Constant load: requests by AMQP, with and without a wish for a reply, and by the HTTP API; deletions now and then.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use super::backend::Backend;
use crate::support::audit::Audit;
use crate::support::broadcastd::App;
use crate::support::sender::Api;
use crate::support::{now_ms, unique};

/// Requests a second.
pub const RATE: u64 = 15;
/// For how long a request id is remembered, seconds: longer than any request here is tried again, and short enough for a long
/// run to reach the state in which as many keys expire as are added. (The default is seven days.)
pub const DEDUPE_SECONDS: u64 = 300;
/// For how long a signature is remembered, seconds: twice `api.checksum_window_seconds` and a minute.
pub const SIGNATURE_SECONDS: u64 = 660;
/// Requests under way at once; beyond it the load waits.
const MAX_UNDER_WAY: usize = 600;

/// How an app is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Unlimited, small and large, some retained for seconds.
    Busy,
    /// Unlimited, everything retained for minutes: more than the 100 that are kept.
    Kept,
    /// The default limits, which it is always over.
    Limited,
}

pub struct Load {
    pub audit: Arc<Mutex<Audit>>,
    pub backend: Arc<Backend>,
    pub apps: Vec<(App, Use)>,
    pub api_urls: Vec<String>,
    /// When calls were signed, milliseconds since the Unix epoch; those whose marks Redis may still keep.
    signed_ms: Mutex<VecDeque<u64>>,
    under_way: Arc<Semaphore>,
}

#[derive(Debug, Clone, Copy)]
enum By {
    Ask,
    Send,
    Http,
}

impl Load {
    pub fn new(audit: &Arc<Mutex<Audit>>, amqp_url: &str, apps: Vec<(App, Use)>, api_urls: Vec<String>) -> Self {
        let under_way = Arc::new(Semaphore::new(MAX_UNDER_WAY));
        Self {
            audit: audit.clone(),
            backend: Arc::new(Backend::new(amqp_url)),
            apps,
            api_urls,
            signed_ms: Mutex::default(),
            under_way,
        }
    }

    /// A call is about to be made: each is signed anew, and its signature is remembered, whatever its outcome.
    fn signing(&self) {
        let mut signed_ms = self.signed_ms.lock().unwrap();
        let (now_ms, kept_ms) = (now_ms(), SIGNATURE_SECONDS * 1100);
        while signed_ms.front().is_some_and(|at_ms| at_ms + kept_ms < now_ms) {
            signed_ms.pop_front();
        }
        signed_ms.push_back(now_ms);
    }

    /// Calls signed since then, milliseconds since the Unix epoch.
    pub fn signed_since(&self, since_ms: u64) -> usize {
        self.signed_ms.lock().unwrap().iter().rev().take_while(|at_ms| **at_ms >= since_ms).count()
    }

    /// For ever, at its rate.
    pub async fn run(self: &Arc<Self>, mut rng: fastrand::Rng) {
        let mut ticks = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
        // After a pause the machine is not to be flooded.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let permit = self.under_way.clone().acquire_owned().await.unwrap();
            let app = match rng.u32(0..10) {
                0..5 => 0,
                5..8 => 1,
                _ => 2,
            };
            let (app, kind) = self.apps[app].clone();
            let api = Api::new(&self.api_urls[rng.usize(0..self.api_urls.len())], &app);
            if rng.u32(0..40) == 0 && kind != Use::Limited {
                let ids = self.audit.lock().unwrap().recallable(&app.key);
                if !ids.is_empty() {
                    let id = ids[rng.usize(0..ids.len())].to_string();
                    let load = self.clone();
                    tokio::spawn(async move {
                        let _permit = permit;
                        load.signing();
                        // Unknown or gone already: the log tells.
                        let _ = api.try_call("history/delBroadcastMsgById.action", &[("broadcastId", &id)]).await;
                    });
                }
                continue;
            }
            let malformed = rng.u32(0..50) == 0;
            let request = request(&app, kind, malformed, &mut rng);
            let by = match rng.u32(0..10) {
                _ if malformed => By::Send,
                0..5 => By::Ask,
                5..7 => By::Send,
                _ => By::Http,
            };
            let load = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                load.submit(&api, by, &request, malformed).await;
            });
        }
    }

    /// Sends the last broadcast of an app, again under a new id while it is over its limit; returns its id.
    pub async fn last(&self, app: &App) -> u64 {
        loop {
            let mut request = json!({ "requestId": unique("request"), "appKey": app.key, "body": "the end" });
            request["dedupeSeconds"] = DEDUPE_SECONDS.into();
            let api = Api::new(&self.api_urls[0], app);
            let reply = self.submit(&api, By::Ask, &request, false).await;
            if let Some(id) = reply["msg"]["broadcastId"].as_u64() {
                return id;
            }
            sleep(Duration::from_secs(2)).await;
        }
    }

    /// Until it has an end, or, without a wish for a reply, until the broker has it.
    async fn submit(&self, api: &Api, by: By, request: &Value, malformed: bool) -> Value {
        let Self { audit, backend, .. } = self;
        let id = request["requestId"].as_str().unwrap();
        let mut pause = Duration::from_millis(500);
        loop {
            audit.lock().unwrap().sending(request, malformed, now_ms());
            match by {
                By::Send => {
                    if backend.send(request).await.is_ok() {
                        return Value::Null;
                    }
                }
                By::Ask => {
                    if let Ok(reply) = backend.ask(request).await
                        && audit.lock().unwrap().told(id, &reply, now_ms())
                    {
                        return reply;
                    }
                }
                By::Http => {
                    self.signing();
                    let form = form(request);
                    let form: Vec<(&str, &str)> = form.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    if let Ok((200, reply)) = api.try_call("msg/broadcastMsg.action", &form).await
                        && audit.lock().unwrap().told(id, &reply, now_ms())
                    {
                        return reply;
                    }
                }
            }
            // Hundreds may be waiting for a server that is starting.
            pause = (pause * 2).min(Duration::from_secs(8));
            sleep(pause).await;
        }
    }
}

fn request(app: &App, kind: Use, malformed: bool, rng: &mut fastrand::Rng) -> Value {
    let id = unique("request");
    let large = kind == Use::Busy && rng.u32(0..6) == 0;
    let padding = "x".repeat(if large { rng.usize(2000..4000) } else { rng.usize(0..200) });
    let mut request = json!({ "requestId": id, "appKey": app.key, "dedupeSeconds": DEDUPE_SECONDS });
    if !malformed {
        request["body"] = format!("{id} {padding}").into();
    }
    let ttl_seconds = match kind {
        Use::Kept => Some(600),
        Use::Busy => (rng.u32(0..3) == 0).then(|| rng.u64(3..40)),
        Use::Limited => rng.bool().then(|| rng.u64(20..120)),
    };
    if let Some(ttl_seconds) = ttl_seconds {
        request["isOffline"] = true.into();
        request["ttlSeconds"] = ttl_seconds.into();
    }
    if rng.u32(0..5) == 0 {
        let some = [json!(["ios", "aos"]), json!(["web"]), json!(["ios", "web", "mac"]), json!(["aos", "pc"])];
        request["targetOs"] = some[rng.usize(0..some.len())].clone();
    }
    request
}

/// The same request as parameters of the HTTP API.
fn form(request: &Value) -> Vec<(&'static str, String)> {
    let names = ["requestId", "body", "isOffline", "ttlSeconds", "targetOs", "dedupeSeconds"];
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    names.into_iter().filter_map(|name| Some((name, text(request.get(name)?)))).collect()
}
