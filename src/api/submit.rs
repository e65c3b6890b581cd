//! Where a checked request goes: over AMQP to a worker, or, in one process, straight to the ledger.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::amqp::AmqpSubmitter;
use crate::backoff::Backoff;
use crate::broadcast::BroadcastId;
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::{Decision, Verdict};
use crate::ledger::{Ledger, LedgerError};
use crate::metrics::Metrics;

/// How a request ended, as far as the API knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// There is a verdict.
    Decided {
        /// Its code.
        code: u16,
        /// The broadcast, if there is one.
        id: Option<BroadcastId>,
        /// The answer for the caller.
        reply: Value,
    },
    /// Nothing was sent; why, as a sentence.
    Busy(&'static str),
    /// It may have been sent; why that is not known, as a sentence.
    Unknown(&'static str),
}

/// The two ways.
#[allow(clippy::large_enum_variant, reason = "there is one in a process")]
pub enum Submitter {
    /// To a worker.
    Amqp(AmqpSubmitter),
    /// To the ledger in this process.
    Direct(DirectSubmitter),
}

impl Submitter {
    /// Submits a request and waits for its end, no longer than the reply timeout.
    pub async fn submit(&self, submission: &Submission) -> Outcome {
        match self {
            Self::Amqp(amqp) => amqp.submit(&submission.request).await,
            Self::Direct(direct) => direct.submit(submission).await,
        }
    }
}

/// Has the ledger decide at once; counts what a worker would count.
pub struct DirectSubmitter {
    ledger: Arc<dyn Ledger>,
    metrics: Metrics,
    reply_timeout: Duration,
}

/// Pauses between two tries: the first, and the most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

impl DirectSubmitter {
    /// `reply_timeout`: how long an unavailable ledger is tried again.
    #[must_use]
    pub fn new(ledger: Arc<dyn Ledger>, metrics: Metrics, reply_timeout: Duration) -> Self {
        Self { ledger, metrics, reply_timeout }
    }

    async fn submit(&self, submission: &Submission) -> Outcome {
        let deadline = Instant::now() + self.reply_timeout;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let health = self.ledger.health();
        // What a ledger in trouble was never asked for is certain not to be sent.
        while health.borrow().is_err() {
            let wait = backoff.next_delay();
            if Instant::now() + wait >= deadline {
                return Outcome::Busy("the store cannot be written; /readyz says why");
            }
            tokio::time::sleep(wait).await;
        }
        loop {
            let started = Instant::now();
            let batch = std::slice::from_ref(submission);
            let Ok(mut results) = tokio::time::timeout_at(deadline, self.ledger.accept(batch)).await else {
                return Outcome::Unknown("the ledger did not answer in time");
            };
            match results.pop() {
                Some(Ok(decision)) => {
                    self.metrics.accept_seconds.observe(started.elapsed().as_secs_f64());
                    return self.decided(submission, decision);
                }
                Some(Err(LedgerError::Corrupt(problem))) => {
                    tracing::error!(request_id = submission.request.id, app = %submission.request.app, problem,
                        "the ledger holds something unreadable");
                    return Outcome::Unknown("the ledger holds something unreadable; its operator must look");
                }
                Some(Err(LedgerError::Unavailable(_))) | None => {
                    // A timed-out try may have been accepted: the same request again finds its own verdict.
                    let wait = backoff.next_delay();
                    if Instant::now() + wait >= deadline {
                        return Outcome::Unknown("the ledger is unavailable");
                    }
                    self.metrics.ledger_retries.inc();
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    fn decided(&self, submission: &Submission, decision: Decision) -> Outcome {
        let verdict = Verdict::from(decision);
        let id = match &verdict {
            Verdict::Accepted(accepted) if accepted.repeated => {
                self.metrics.repeated.inc();
                Some(accepted.id)
            }
            Verdict::Accepted(accepted) => {
                self.metrics.accepted.inc();
                self.metrics.nodes_targeted.inc_by(accepted.targeted.into());
                self.metrics.nodes_reached.inc_by(accepted.reached.into());
                Some(accepted.id)
            }
            Verdict::Refused(_) | Verdict::Rejected(_) => {
                self.metrics.refused.with_label_values(&[verdict.reason()]).inc();
                None
            }
        };
        Outcome::Decided { code: verdict.code(), id, reply: verdict.reply(Some(&submission.request)) }
    }
}
