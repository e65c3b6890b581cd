//! What is done with deliveries, from intake until they are settled.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicQosOptions, BasicRejectOptions};
use tokio_util::sync::CancellationToken;

use super::acks::AckWindow;
use super::intake::{self, Item};
use super::outbox::{Outbox, Stored};
use super::{SessionError, Worker};
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::{Rejection, Verdict, code};
use crate::failpoint;
use crate::ledger::LedgerError;

/// How a delivery is to be settled.
pub(super) enum Settle {
    /// Acknowledge; then, for a refusal, reply. A crash in between costs a reply, never a "refused" that is sent later.
    Ack { item: Item, reply_after: Option<Verdict> },
    /// Reject: the broker itself moves it to the dead letters. Only while it takes no publishes.
    Reject { item: Item },
}

/// Deliveries with their verdicts.
pub(super) type Decided = Vec<(Item, Verdict)>;
/// Deliveries that the ledger is to decide.
pub(super) type Open = Vec<(Item, Submission)>;

/// Reads and checks deliveries: those with a verdict already, which need not wait for the ledger, and those for the ledger.
pub(super) fn sort(worker: &Worker, deliveries: impl Iterator<Item = Delivery>) -> (Decided, Open) {
    let (mut rejected, mut submissions) = (Vec::new(), Vec::new());
    for delivery in deliveries {
        match intake::read(delivery, &worker.directory, |queue| intake::may_reply(worker, queue)) {
            (item, Ok(submission)) => submissions.push((item, submission)),
            (item, Err(verdict)) => rejected.push((item, verdict)),
        }
    }
    (rejected, submissions)
}

/// What became of one question to the ledger.
pub(super) struct Answered {
    pub(super) decided: Decided,
    /// Not decided, and why one of them was not: to be asked about again.
    pub(super) open: Open,
    pub(super) error: Option<LedgerError>,
}

/// Has the ledger decide a batch that is fresh.
pub(super) async fn decide(worker: &Worker, batch: Open) -> Answered {
    for (_, submission) in &batch {
        failpoint::reached("worker::before-ledger", submission.request.id.as_str());
    }
    ask(worker, batch).await
}

/// Asks the ledger again, after a while.
pub(super) async fn decide_again(
    worker: &Worker,
    shutdown: &CancellationToken,
    delay: Duration,
    batch: Open,
) -> Answered {
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = shutdown.cancelled() => {}
    }
    worker.metrics.ledger_retries.inc();
    ask(worker, batch).await
}

async fn ask(worker: &Worker, batch: Open) -> Answered {
    let (items, submissions): (Vec<Item>, Vec<Submission>) = batch.into_iter().unzip();
    let timer = worker.metrics.accept_seconds.start_timer();
    let answers = worker.ledger.accept(&submissions).await;
    timer.observe_duration();
    let mut answered = Answered { decided: Vec::with_capacity(items.len()), open: Vec::new(), error: None };
    // By what is missing, not by what failed: a request without an answer must not get its neighbour's.
    let answers = answers.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    for ((mut item, submission), answer) in items.into_iter().zip(submissions).zip(answers) {
        let verdict = match answer {
            Some(Ok(decision)) => decision.into(),
            Some(Err(error)) if !error.is_retryable() => {
                tracing::error!(%error, app = %submission.request.app, "a request cannot be decided");
                let desc = "the app's stored data is unreadable; its operator has to look";
                Verdict::Rejected(Rejection { code: code::UNKNOWN, reason: "ledger_corrupt", desc: desc.into() })
            }
            unanswered => {
                answered.error = answered.error.or_else(|| unanswered.and_then(Result::err));
                answered.open.push((item, submission));
                continue;
            }
        };
        item.request = Some(submission.request);
        answered.decided.push((item, verdict));
    }
    answered
}

/// Tells the senders of what was accepted, and says how to settle. What nobody can be told of is for the dead letters, and
/// comes back: it may have to wait there, and nothing else is to wait with it.
pub(super) async fn finish(worker: &Worker, outbox: &Outbox<'_>, items: Decided) -> (Vec<Settle>, Decided) {
    let mut settled = Vec::with_capacity(items.len());
    let mut dead = Vec::new();
    let mut replies = Vec::new();
    for (item, verdict) in items {
        report(worker, &item, &verdict);
        let request_id = item.request.as_ref().map_or("", |request| request.id.as_str());
        if matches!(verdict, Verdict::Accepted(_)) {
            failpoint::reached("worker::before-reply", request_id);
            replies.push(outbox.reply(&item, &verdict));
            settled.push(Settle::Ack { item, reply_after: None });
        } else if item.reply_to.is_some() && !is_malformed(&item, &verdict) {
            failpoint::reached("worker::refusal-before-ack", request_id);
            settled.push(Settle::Ack { item, reply_after: Some(verdict) });
        } else {
            // Malformed, or nobody waits for the answer: it is kept, with its reason.
            dead.push((item, verdict));
        }
    }
    outbox.replied(replies).await;
    if !settled.is_empty() {
        failpoint::reached("worker::before-ack", "");
    }
    (settled, dead)
}

/// Stores dead letters and says how to settle their requests; those that could not be stored come back.
pub(super) async fn bury(
    outbox: &Outbox<'_>,
    shutdown: &CancellationToken,
    dead: Decided,
) -> Result<(Vec<Settle>, Decided), SessionError> {
    let stored = outbox.dead_letter(&dead, shutdown).await?;
    if matches!(stored, Stored::NotAll) {
        return Ok((Vec::new(), dead));
    }
    failpoint::reached("worker::after-dead-letter", "");
    let settle = |(item, verdict): (Item, Verdict)| {
        if matches!(stored, Stored::Blocked) {
            return Settle::Reject { item };
        }
        let reply_after = item.reply_to.is_some().then_some(verdict);
        Settle::Ack { item, reply_after }
    };
    Ok((dead.into_iter().map(settle).collect(), Vec::new()))
}

/// Acknowledges, and returns the replies that come only after that.
pub(super) async fn settle(
    channel: &Channel,
    window: &mut AckWindow,
    settled: Vec<Settle>,
) -> Result<Decided, SessionError> {
    let mut tags = Vec::with_capacity(settled.len());
    let mut late = Vec::new();
    for settle in settled {
        match settle {
            Settle::Ack { item, reply_after } => {
                tags.push(item.tag);
                late.extend(reply_after.map(|verdict| (item, verdict)));
            }
            Settle::Reject { item } => {
                channel.basic_reject(item.tag, BasicRejectOptions { requeue: false }).await?;
                window.rejected(item.tag);
            }
        }
    }
    let acks = window.done(tags);
    if !channel.status().connected() {
        return Err(SessionError::AckRefused);
    }
    if let Some(tag) = acks.up_to {
        channel.basic_ack(tag, BasicAckOptions { multiple: true }).await?;
    }
    for tag in acks.single {
        channel.basic_ack(tag, BasicAckOptions { multiple: false }).await?;
    }
    Ok(late)
}

/// Once the broker has the acknowledgements, what comes only after that: the late replies. They take another connection, so
/// without waiting a crash could lose the acknowledgement of a request whose refusal was told.
pub(super) async fn tell_late(
    worker: &Worker,
    channel: &Channel,
    outbox: &Outbox<'_>,
    replies: Decided,
) -> Result<(), SessionError> {
    // A channel's calls are carried out in order. This one changes nothing, and has an answer.
    channel.basic_qos(worker.amqp.prefetch, BasicQosOptions::default()).await?;
    let mut sent = Vec::with_capacity(replies.len());
    for (item, verdict) in &replies {
        let request_id = item.request.as_ref().map_or("", |request| request.id.as_str());
        failpoint::reached("worker::refusal-after-ack", request_id);
        sent.push(outbox.reply(item, verdict));
    }
    outbox.replied(sent).await;
    Ok(())
}

/// Whether the request itself is at fault, rather than its sender's rights or limits.
const fn is_malformed(item: &Item, verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Rejected(rejection) if rejection.code != code::FORBIDDEN || item.request.is_none())
}

/// One line and the figures of one decided request.
fn report(worker: &Worker, item: &Item, verdict: &Verdict) {
    let metrics = &worker.metrics;
    let request_id = item.request.as_ref().map_or("", |request| request.id.as_str());
    let app = item.request.as_ref().map_or("", |request| request.app.as_str());
    match verdict {
        Verdict::Accepted(accepted) if accepted.repeated => {
            metrics.repeated.inc();
            tracing::info!(request_id, app, id = accepted.id, "accepted before; nothing sent again");
        }
        Verdict::Accepted(accepted) => {
            metrics.accepted.inc();
            metrics.nodes_targeted.inc_by(accepted.targeted.into());
            metrics.nodes_reached.inc_by(accepted.reached.into());
            if let Some(enqueued_at_ms) = item.enqueued_at_ms {
                let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
                let age =
                    Duration::from_millis(u64::try_from(now_ms).unwrap_or(u64::MAX).saturating_sub(enqueued_at_ms));
                metrics.queue_age_seconds.observe(age.as_secs_f64());
            }
            let (targeted, reached) = (accepted.targeted, accepted.reached);
            tracing::info!(request_id, app, id = accepted.id, targeted, reached, "accepted");
        }
        Verdict::Refused(_) | Verdict::Rejected(_) => {
            metrics.refused.with_label_values(&[verdict.reason()]).inc();
            tracing::info!(request_id, app, code = verdict.code(), reason = verdict.reason(), "refused");
        }
    }
}
