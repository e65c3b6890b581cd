//! The calls about broadcasts that exist: one, a page of them, and deletion.

use std::future::Future;
use std::sync::Arc;

use serde_json::{Value, json};

use super::form::Form;
use super::nim::Answer;
use super::{Api, Place};
use crate::broadcast::app::App;
use crate::broadcast::envelope;
use crate::broadcast::verdict::{Rejection, code};
use crate::broadcast::{BroadcastId, MAX_ID};
use crate::ledger::{Kind, LedgerError};

/// The most that one page has, and the default.
const MAX_PAGE: usize = 100;

pub(super) async fn query_by_id(api: &Api, app: &App, mut form: Form) -> Result<Answer, Answer> {
    let id = broadcast_id(&mut form)?;
    let found = api.ask(app, api.ledger.find(&app.key, id)).await?;
    found.as_ref().and_then(envelope::history).map(|msg| ok("msg", msg)).ok_or_else(not_found)
}

/// `broadcastId`: the listing continues strictly below it, 0 (the default) starts at the newest.
pub(super) async fn query(api: &Api, app: &App, mut form: Form) -> Result<Answer, Answer> {
    let before = match form.take_number("broadcastId")? {
        None => 0,
        Some(id) => BroadcastId::try_from(id)
            .ok()
            .filter(|id| *id <= MAX_ID)
            .ok_or_else(|| Rejection::bad("bad_id", "broadcastId is 0 or the id of a broadcast"))?,
    };
    let limit = match form.take_number("limit")? {
        None => MAX_PAGE,
        Some(limit) => usize::try_from(limit)
            .ok()
            .filter(|limit| (1..=MAX_PAGE).contains(limit))
            .ok_or_else(|| Rejection::bad("bad_limit", format!("limit is from 1 to {MAX_PAGE}")))?,
    };
    let kind = match form.take_number("type")? {
        None | Some(1) => Kind::All,
        Some(2) => Kind::Retained,
        Some(3) => Kind::OnlineOnly,
        Some(_) => return Err(Rejection::bad("bad_type", "type is 1 (all), 2 (retained) or 3 (not retained)").into()),
    };
    let list = api.ask(app, api.ledger.list(&app.key, before, limit, kind)).await?;
    // The official SDKs read the array `msgs` beside `code`, not inside `msg`.
    Ok(ok("msgs", list.iter().filter_map(envelope::history).collect()))
}

/// Deletes a broadcast. One that is gone already is a 404: also the second time that the same deletion is asked for.
pub(super) async fn delete(api: &Arc<Api>, app: Arc<App>, mut form: Form, place: Place) -> Result<Answer, Answer> {
    let id = broadcast_id(&mut form)?;
    let api = Arc::clone(api);
    // A task of its own: a caller that hangs up must not leave a deletion half done and unlogged.
    let task = tokio::spawn(async move {
        let _place = place;
        api.recall(&app, id).await
    });
    task.await.map_err(|_| Answer::error(code::UNKNOWN, UNKNOWN_DELETION))?
}

const UNKNOWN_DELETION: &str =
    "unknown: the ledger did not answer; ask again: if it is gone by then, the answer is 404";

impl Api {
    async fn recall(&self, app: &App, id: BroadcastId) -> Result<Answer, Answer> {
        match self.bounded(self.ledger.recall(&app.key, id)).await {
            Ok(Some(recalled)) => {
                tracing::info!(app = %app.key, broadcast_id = id, recall_id = recalled.recall_id,
                    targeted = recalled.targeted, reached = recalled.reached, "broadcast recalled");
                Ok(Answer { code: code::OK, json: json!({ "code": code::OK }) })
            }
            Ok(None) => Err(not_found()),
            Err(problem) => {
                tracing::warn!(app = %app.key, broadcast_id = id, %problem, "a deletion's outcome is unknown");
                Err(match problem {
                    // The ledger may have got it before it went silent, so this is no 503.
                    LedgerError::Unavailable(_) => Answer::error(code::UNKNOWN, UNKNOWN_DELETION),
                    LedgerError::Corrupt(_) => unreadable(),
                })
            }
        }
    }

    /// Asks the ledger something that changes nothing.
    async fn ask<T>(&self, app: &App, answer: impl Future<Output = Result<T, LedgerError>>) -> Result<T, Answer> {
        self.bounded(answer).await.map_err(|problem| {
            tracing::warn!(app = %app.key, %problem, "a history call had no answer from the ledger");
            match problem {
                LedgerError::Unavailable(_) => Answer::error(code::BUSY, "the ledger is unavailable; try again later"),
                LedgerError::Corrupt(_) => unreadable(),
            }
        })
    }

    /// Waits for the ledger, no longer than for a reply.
    pub(super) async fn bounded<T>(
        &self,
        answer: impl Future<Output = Result<T, LedgerError>>,
    ) -> Result<T, LedgerError> {
        tokio::time::timeout(self.settings.reply_timeout(), answer)
            .await
            .unwrap_or_else(|_| Err(LedgerError::Unavailable("no answer in time".to_owned())))
    }
}

fn broadcast_id(form: &mut Form) -> Result<BroadcastId, Rejection> {
    let id = form.take_number("broadcastId")?.and_then(|id| BroadcastId::try_from(id).ok());
    id.filter(|id| (1..=MAX_ID).contains(id))
        .ok_or_else(|| Rejection::bad("bad_id", "broadcastId is the id of a broadcast"))
}

fn ok(name: &'static str, value: Value) -> Answer {
    Answer { code: code::OK, json: json!({ "code": code::OK, name: value }) }
}

fn unreadable() -> Answer {
    Answer::error(code::UNKNOWN, "the ledger holds something unreadable")
}

fn not_found() -> Answer {
    Answer::error(code::NOT_FOUND, "there is no such broadcast: it was deleted, has expired or never was")
}
