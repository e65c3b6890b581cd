//! One batch of deliveries, from intake to the point where they may be settled.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::message::Delivery;
use tokio_util::sync::CancellationToken;

use super::intake::{self, Item};
use super::outbox::Outbox;
use super::{SessionError, Worker};
use crate::backoff::Backoff;
use crate::broadcast::request::Submission;
use crate::broadcast::verdict::{Rejection, Verdict, code};
use crate::failpoint;

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

/// Has the ledger decide a batch. `None`: the worker is to stop and the ledger still does not answer; closing the connection
/// gives the batch back to the queue.
pub(super) async fn decide(worker: &Worker, shutdown: &CancellationToken, batch: Open) -> Option<Decided> {
    let (items, submissions): (Vec<Item>, Vec<Submission>) = batch.into_iter().unzip();
    for submission in &submissions {
        failpoint::reached("worker::before-ledger", submission.request.id.as_str());
    }
    let verdicts = ask(worker, shutdown, &submissions).await?;
    let decided = items.into_iter().zip(submissions).zip(verdicts).map(|((mut item, submission), verdict)| {
        item.request = Some(submission.request);
        (item, verdict)
    });
    Some(decided.collect())
}

/// Asks the ledger, however long it takes: while it does not answer, the deliveries are held, unacknowledged and
/// bounded by the prefetch. Handing them back would only burn their delivery limit.
///
/// `None`: the worker is to stop and the ledger still does not answer.
async fn ask(worker: &Worker, shutdown: &CancellationToken, submissions: &[Submission]) -> Option<Vec<Verdict>> {
    let mut verdicts: Vec<Option<Verdict>> = vec![None; submissions.len()];
    let mut open: Vec<usize> = (0..submissions.len()).collect();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut held = Held { gauge: &worker.metrics.held, count: 0 };
    let mut again: Vec<Submission> = Vec::new();
    loop {
        let timer = worker.metrics.accept_seconds.start_timer();
        let batch = if open.len() == submissions.len() { submissions } else { &again };
        let answers = worker.ledger.accept(batch).await;
        timer.observe_duration();
        let mut warned = held.count > 0;
        for (&position, answer) in open.iter().zip(answers) {
            match answer {
                Ok(decision) => verdicts[position] = Some(decision.into()),
                Err(error) if error.is_retryable() => {
                    if !std::mem::replace(&mut warned, true) {
                        tracing::warn!(%error, "requests are held until the ledger answers");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, app = %submissions[position].request.app, "a request cannot be decided");
                    let desc = "the app's stored data is unreadable; its operator has to look";
                    verdicts[position] = Some(Verdict::Rejected(Rejection {
                        code: code::UNKNOWN,
                        reason: "ledger_corrupt",
                        desc: desc.into(),
                    }));
                }
            }
        }
        // By what is missing, not by what failed: a request without an answer must not get its neighbour's.
        let still_open: Vec<usize> = open.into_iter().filter(|position| verdicts[*position].is_none()).collect();
        if still_open.is_empty() {
            return Some(verdicts.into_iter().flatten().collect());
        }
        if shutdown.is_cancelled() {
            tracing::warn!(requests = submissions.len(), "stopping while the ledger is away: given back to the queue");
            return None;
        }
        held.set(still_open.len());
        worker.metrics.ledger_retries.inc();
        again = still_open.iter().map(|position| submissions[*position].clone()).collect();
        open = still_open;
        tokio::select! {
            () = backoff.wait() => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// Keeps the gauge right, also when the session ends in the middle.
struct Held<'a> {
    gauge: &'a prometheus::IntGauge,
    count: i64,
}

impl Held<'_> {
    fn set(&mut self, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.gauge.add(count - self.count);
        self.count = count;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.gauge.sub(self.count);
    }
}

/// Tells the senders of what was accepted, keeps what nobody can be told of, and says how to settle.
pub(super) async fn finish(
    worker: &Worker,
    outbox: &Outbox,
    shutdown: &CancellationToken,
    items: Decided,
) -> Result<Vec<Settle>, SessionError> {
    let mut settled = Vec::with_capacity(items.len());
    let mut dead = Vec::new();
    let mut replies = Vec::new();
    for (item, verdict) in items {
        report(worker, &item, &verdict);
        let request_id = item.request.as_ref().map_or("", |request| request.id.as_str());
        if matches!(verdict, Verdict::Accepted(_)) {
            failpoint::reached("worker::before-reply", request_id);
            replies.push(outbox.reply(&item, &verdict).await);
            settled.push(Settle::Ack { item, reply_after: None });
        } else if item.reply_to.is_some() && !is_malformed(&item, &verdict) {
            failpoint::reached("worker::refusal-before-ack", request_id);
            settled.push(Settle::Ack { item, reply_after: Some(verdict) });
        } else {
            // Malformed, or nobody waits for the answer: it is kept, with its reason.
            dead.push((item, verdict));
        }
    }
    let mut broker_moves = outbox.blocked();
    if !dead.is_empty() && !broker_moves {
        match outbox.dead_letter(&dead, shutdown).await {
            Ok(true) => {}
            // Unsettled: closing the connection gives them back to the queue.
            Ok(false) => dead.clear(),
            // The alarm came up just now, with this publish.
            Err(_) if outbox.blocked() => broker_moves = true,
            Err(error) => return Err(error),
        }
    }
    if !dead.is_empty() {
        failpoint::reached("worker::after-dead-letter", "");
    }
    settled.extend(dead.into_iter().map(|(item, verdict)| {
        if broker_moves {
            return Settle::Reject { item };
        }
        let reply_after = item.reply_to.is_some().then_some(verdict);
        Settle::Ack { item, reply_after }
    }));
    outbox.replied(replies).await;
    failpoint::reached("worker::before-ack", "");
    Ok(settled)
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
