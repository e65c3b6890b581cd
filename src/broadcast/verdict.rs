//! What became of a request, and how its sender is told.

use serde_json::json;

use super::BroadcastId;
use super::request::Request;

/// The codes of the NIM API that a verdict can carry.
pub mod code {
    /// Done.
    pub const OK: u16 = 200;
    /// App unknown, or broadcasts not activated for it.
    pub const FORBIDDEN: u16 = 403;
    /// No such broadcast.
    pub const NOT_FOUND: u16 = 404;
    /// A parameter is missing, malformed or out of range.
    pub const BAD_PARAMETER: u16 = 414;
    /// Over the limit.
    pub const FREQUENCY: u16 = 416;
    /// What happened is unknown: ask again with the same request id.
    pub const UNKNOWN: u16 = 500;
    /// Nothing was sent: come back later.
    pub const BUSY: u16 = 503;
}

/// Which limit a refused request met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// So many in any 60 seconds.
    Minute,
    /// So many in a UTC day.
    Day,
}

/// Over the limit; nothing was charged or stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The limit that is used up.
    pub limit: Limit,
    /// Seconds until it frees, at least 1.
    pub retry_after: u64,
}

/// A request that became a broadcast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Its id.
    pub id: BroadcastId,
    /// When it was accepted, by the ledger's clock: milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Until when it is valid, likewise; 0 if it is not retained.
    pub expires_ms: u64,
    /// Nodes that held a lease for the app.
    pub targeted: u32,
    /// Nodes that were subscribed, of those targeted. The others catch up at their next lease renewal.
    pub reached: u32,
    /// Whether this request id had been accepted before; nothing was charged or sent again.
    pub repeated: bool,
}

/// What the ledger says of a well-formed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It is a broadcast.
    Accepted(Accepted),
    /// Over the limit.
    Refused(Refusal),
    /// The request id was accepted with another content.
    Conflict,
}

/// A request that cannot become a broadcast: the code and the sentence for its sender, the label for metrics and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// 414 or 403.
    pub code: u16,
    /// One of a fixed set, safe as a metric label and in a log line.
    pub reason: &'static str,
    /// For the sender; may name what was sent, so it is never logged.
    pub desc: String,
}

impl Rejection {
    /// A 414.
    #[must_use]
    pub fn bad(reason: &'static str, desc: impl Into<String>) -> Self {
        Self { code: code::BAD_PARAMETER, reason, desc: desc.into() }
    }

    /// A 403.
    #[must_use]
    pub fn forbidden(reason: &'static str, desc: impl Into<String>) -> Self {
        Self { code: code::FORBIDDEN, reason, desc: desc.into() }
    }
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is a broadcast: 200.
    Accepted(Accepted),
    /// Over the limit: 416.
    Refused(Refusal),
    /// Malformed, or not allowed: 414 or 403.
    Rejected(Rejection),
}

impl From<Decision> for Verdict {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Accepted(accepted) => Self::Accepted(accepted),
            Decision::Refused(refusal) => Self::Refused(refusal),
            Decision::Conflict => Self::Rejected(Rejection::bad(
                "request_id_reused",
                "this requestId was accepted with another content; a new broadcast needs a new requestId",
            )),
        }
    }
}

impl Verdict {
    /// The code for the sender.
    #[must_use]
    pub const fn code(&self) -> u16 {
        match self {
            Self::Accepted(_) => code::OK,
            Self::Refused(_) => code::FREQUENCY,
            Self::Rejected(rejection) => rejection.code,
        }
    }

    /// A label from a fixed set, for metrics, logs and dead letters.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Accepted(_) => "accepted",
            Self::Refused(Refusal { limit: Limit::Minute, .. }) => "limit_minute",
            Self::Refused(Refusal { limit: Limit::Day, .. }) => "limit_day",
            Self::Rejected(rejection) => rejection.reason,
        }
    }

    /// The sentence for the sender; empty for an accepted request.
    #[must_use]
    pub fn desc(&self) -> String {
        match self {
            Self::Accepted(_) => String::new(),
            Self::Refused(Refusal { limit, retry_after }) => {
                let window = if *limit == Limit::Minute { "minute" } else { "day" };
                format!("over the limit of broadcasts a {window}; try again in {retry_after} s")
            }
            Self::Rejected(rejection) => rejection.desc.clone(),
        }
    }

    /// The reply as the sender gets it: `{"code":200,"msg":{…}}` or `{"code":416,"desc":"…","retryAfter":37}`.
    ///
    /// `request`: the request, where it could be read.
    #[must_use]
    pub fn reply(&self, request: Option<&Request>) -> serde_json::Value {
        match self {
            Self::Accepted(accepted) => {
                let mut msg = json!({ "broadcastId": accepted.id, "createTime": accepted.time_ms });
                if accepted.expires_ms != 0 {
                    msg["expireTime"] = accepted.expires_ms.into();
                }
                if let Some(request) = request {
                    msg["isOffline"] = request.ttl_ms.is_some().into();
                    if !request.from.is_empty() {
                        msg["from"] = request.from.as_str().into();
                    }
                    msg["body"] = request.body.as_str().into();
                    msg["targetOs"] = request.targets.names().into();
                }
                json!({ "code": code::OK, "msg": msg })
            }
            Self::Refused(refusal) => {
                json!({ "code": self.code(), "desc": self.desc(), "retryAfter": refusal.retry_after })
            }
            Self::Rejected(_) => json!({ "code": self.code(), "desc": self.desc() }),
        }
    }
}
