//! The NIM calls. The HTTP status is always 200; the outcome is the `code` in the JSON, as that API's clients expect.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request as HttpRequest, State};
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::form::Form;
use super::signature::{self, Signed, single};
use super::submit::Outcome;
use super::{Api, Place, body, history};
use crate::broadcast::app::App;
use crate::broadcast::request::{MAX_REQUEST_ID, RawRequest, Request, Submission, hex};
use crate::broadcast::verdict::{Rejection, code};

/// Answers the SDKs' probe of a base address.
pub const LIVENESS: &str = "/nimserver/health/liveness.action";

/// For how long an id made of the SDK's `RequestId` header is remembered, in milliseconds: 10 minutes. Some callers use one
/// trace id for a whole day.
const SDK_DEDUPE_MS: u64 = 600_000;

/// The calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Sends a broadcast.
    Broadcast,
    /// One broadcast.
    QueryById,
    /// A page of them.
    Query,
    /// Deletes one.
    Delete,
}

impl Call {
    /// Every call.
    pub const ALL: [Self; 4] = [Self::Broadcast, Self::QueryById, Self::Query, Self::Delete];

    /// Its path.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Broadcast => "/nimserver/msg/broadcastMsg.action",
            Self::QueryById => "/nimserver/history/queryBroadcastMsgById.action",
            Self::Query => "/nimserver/history/queryBroadcastMsg.action",
            Self::Delete => "/nimserver/history/delBroadcastMsgById.action",
        }
    }

    /// Its label in the metrics.
    const fn label(self) -> &'static str {
        match self {
            Self::Broadcast => "broadcast",
            Self::QueryById => "query_by_id",
            Self::Query => "query",
            Self::Delete => "delete",
        }
    }

    pub(crate) const fn parameters(self) -> &'static [&'static str] {
        match self {
            Self::Broadcast => {
                &["body", "from", "isOffline", "ttl", "ttlSeconds", "targetOs", "requestId", "dedupeSeconds"]
            }
            Self::QueryById | Self::Delete => &["broadcastId"],
            Self::Query => &["broadcastId", "limit", "type"],
        }
    }
}

/// An answer: the code and the JSON that carries it.
pub(super) struct Answer {
    pub(super) code: u16,
    pub(super) json: Value,
}

impl Answer {
    pub(super) fn error(code: u16, desc: &str) -> Self {
        Self { code, json: json!({ "code": code, "desc": desc }) }
    }
}

impl From<Rejection> for Answer {
    fn from(rejection: Rejection) -> Self {
        Self::error(rejection.code, &rejection.desc)
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let headers = [(CONTENT_TYPE, "application/json; charset=utf-8"), (CACHE_CONTROL, "no-store")];
        (headers, self.json.to_string()).into_response()
    }
}

/// Handles a call, counts it and times it.
pub(super) async fn call(State(api): State<Arc<Api>>, call: Call, request: HttpRequest) -> Response {
    let started = Instant::now();
    let answer = api.answer(call, request).await.unwrap_or_else(|refused| refused);
    api.metrics.api_calls.with_label_values(&[call.label(), &code_label(answer.code)]).inc();
    api.metrics.api_seconds.with_label_values(&[call.label()]).observe(started.elapsed().as_secs_f64());
    answer.into_response()
}

/// The code as a label; one that a newer worker made up must not make a new series.
fn code_label(code: u16) -> String {
    if (100..600).contains(&code) { code.to_string() } else { "other".to_owned() }
}

pub(super) async fn liveness() -> Response {
    Answer { code: code::OK, json: json!({ "code": code::OK }) }.into_response()
}

pub(super) async fn no_such_call() -> Response {
    Answer::error(code::NOT_FOUND, "there is no such call here").into_response()
}

pub(super) async fn not_post() -> Response {
    Answer::error(code::BAD_PARAMETER, "this call is a POST with a form-urlencoded body").into_response()
}

impl Api {
    async fn answer(self: &Arc<Self>, call: Call, request: HttpRequest) -> Result<Answer, Answer> {
        let (parts, body) = request.into_parts();
        // Read before the signature is judged, so that the connection stays usable; bounded either way.
        let body = body::read(&parts.headers, body, self.settings.max_body_bytes).await;
        let app = self.authenticate(&parts.headers).await?;
        let mut form = Form::parse(single(&parts.headers, "Content-Type")?, &body?, call.parameters())?;
        if !app.broadcast {
            return Err(Answer::error(code::FORBIDDEN, "broadcasts are not activated for this app"));
        }
        let Some(place) = self.place(&app) else {
            let mut busy = Answer::error(code::BUSY, "busy: nothing was sent; try again later");
            if let Some(id) = form.take("requestId").filter(|id| !id.is_empty()) {
                busy.json["requestId"] = id.into();
            }
            return Err(busy);
        };
        match call {
            Call::Broadcast => self.broadcast(&app, &parts.headers, form, place).await,
            Call::QueryById => history::query_by_id(self, &app, form).await,
            Call::Query => history::query(self, &app, form).await,
            Call::Delete => history::delete(self, app, form, place).await,
        }
    }

    async fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<App>, Answer> {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let window_s = self.settings.checksum_window_seconds;
        let signed = Signed::from_headers(headers)?;
        let app = self.directory.get(signed.app_key);
        let check_sum = signed.verify(app.map(|app| &app.secret), now_s, window_s)?;
        // `verify` has refused an unknown app.
        let app = app.cloned().ok_or_else(|| Rejection::bad("bad_signature", "AppKey is unknown"))?;
        match self.bounded(signature::take(&*self.ledger, &app.key, check_sum, window_s)).await {
            Ok(true) => Ok(app),
            Ok(false) => {
                Err(Rejection::bad("replayed", "this Nonce and CurTime were used before; sign each call anew").into())
            }
            Err(error) => {
                tracing::warn!(%error, app = %app.key, "a call was refused: whether it is a replay cannot be told");
                let desc =
                    "busy: nothing was sent (signatures cannot be compared with earlier ones); sign anew, try later";
                Err(Answer::error(code::BUSY, desc))
            }
        }
    }

    async fn broadcast(
        self: &Arc<Self>,
        app: &App,
        headers: &HeaderMap,
        form: Form,
        place: Place,
    ) -> Result<Answer, Answer> {
        let request = request(app, form, single(headers, "RequestId")?)?;
        let submission = Submission::new(request, &self.directory).map_err(|(_, rejection)| rejection)?;
        let api = Arc::clone(self);
        // A task of its own: a caller that hangs up must not leave a request half submitted and unlogged.
        let task = tokio::spawn(async move {
            let _place = place;
            api.submit(&submission).await
        });
        task.await.map_err(|_| Answer::error(code::UNKNOWN, "unknown: this server failed; ask again"))
    }

    async fn submit(&self, submission: &Submission) -> Answer {
        let request = &submission.request;
        let outcome = self.submitter.submit(submission).await;
        let (answer, id, problem) = match outcome {
            Outcome::Decided { code, id, reply } => (Answer { code, json: reply }, id, None),
            Outcome::Busy(why) => {
                let desc = format!("busy: nothing was sent ({why}); ask again later with the same requestId");
                (with_request_id(code::BUSY, &desc, &request.id), None, Some(why))
            }
            Outcome::Unknown(why) => {
                let desc = format!("unknown: {why}; ask again with the same requestId");
                (with_request_id(code::UNKNOWN, &desc, &request.id), None, Some(why))
            }
        };
        tracing::info!(
            request_id = request.id,
            app = %request.app,
            code = answer.code,
            broadcast_id = id,
            problem,
            "broadcast call answered"
        );
        answer
    }
}

fn with_request_id(code: u16, desc: &str, request_id: &str) -> Answer {
    Answer { code, json: json!({ "code": code, "desc": desc, "requestId": request_id }) }
}

/// The request that the parameters describe. `sdk_id`: the `RequestId` header.
pub(crate) fn request(app: &App, mut form: Form, sdk_id: Option<&str>) -> Result<Request, Rejection> {
    let given = form.take("requestId").filter(|id| !id.is_empty());
    let dedupe_seconds = form.take_number("dedupeSeconds")?;
    let target_os = match form.take("targetOs").filter(|text| !text.is_empty()) {
        None => None,
        Some(text) => Some(serde_json::from_str(&text).map_err(|_| {
            Rejection::bad("bad_target_os", r#"targetOs is a JSON array of strings, such as ["ios","web"]"#)
        })?),
    };
    let raw = RawRequest {
        request_id: given,
        app_key: Some(app.key.as_str().to_owned()),
        from: form.take("from"),
        body: form.take("body"),
        is_offline: form.take_bool("isOffline")?,
        ttl: form.take_number("ttl")?,
        ttl_seconds: form.take_number("ttlSeconds")?,
        target_os,
        dedupe_seconds,
    };
    let own = raw.request_id.is_some();
    let mut request = Request::from_raw(raw, Some(&Uuid::now_v7().to_string()))?;
    if let Some(header) = sdk_id.filter(|header| !own && !header.is_empty()) {
        request.id = sdk_request_id(header, &request.content_hash());
        if dedupe_seconds.is_none() {
            request.dedupe_ms = SDK_DEDUPE_MS;
        }
    }
    Ok(request)
}

/// The SDKs send their retries under one trace id; the content's hash keeps apart the sends of a caller that uses one trace
/// id for several.
fn sdk_request_id(header: &str, content_hash: &str) -> String {
    let room = MAX_REQUEST_ID - "sdk::".len() - content_hash.len();
    if header.len() <= room && header.bytes().all(|byte| byte.is_ascii_graphic()) {
        format!("sdk:{header}:{content_hash}")
    } else {
        format!("sdk:{}:{content_hash}", hex(&Sha256::digest(header.as_bytes())[..16]))
    }
}

#[cfg(test)]
#[path = "nim_tests.rs"]
mod tests;
