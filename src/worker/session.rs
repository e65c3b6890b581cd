//! One session with the broker: connect, declare, consume, settle, until something breaks or the worker is told to stop.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::acks::AckWindow;
use super::intake::Item;
use super::outbox::Outbox;
use super::process::{self, Decided, Settle};
use super::suspects::{self, Suspects};
use super::{SessionError, Worker, topology};
use crate::amqp::connect;
use crate::broadcast::verdict::Verdict;
use crate::failpoint;

/// How often the outbox is looked at: lapin tells the death of a connection only to those that use it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// So many may be acknowledged past one that waits; beyond it suspects are no longer made to wait for what is fresh.
const MOST_OUT_OF_ORDER: usize = 100_000;

/// With so many batches at the ledger another one that is not full waits for more: it would only be another round trip.
const ENOUGH_AT_LEDGER: usize = 2;

/// A batch on its way; `alone`: it is a single suspect.
enum Done {
    /// The ledger has decided it; `None`: the worker is to stop, and it does not answer.
    Answered {
        decided: Option<Decided>,
        alone: bool,
    },
    /// It may be settled.
    Finished {
        settled: Result<Vec<Settle>, SessionError>,
        alone: bool,
    },
    Acknowledged {
        result: Result<(), SessionError>,
        alone: bool,
    },
}

/// How long it may take from connecting to consuming. A broker that is booting answers some calls and leaves others hanging.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);

struct Session {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
    outbox: Outbox,
}

/// Runs a session. `Ok` after an orderly stop.
pub(super) async fn run(
    worker: &Worker,
    health: &watch::Sender<Result<(), String>>,
    shutdown: &CancellationToken,
) -> Result<(), SessionError> {
    let Session { connection, channel, consumer, outbox } = tokio::select! {
        session = tokio::time::timeout(SETUP_TIMEOUT, open(worker)) => {
            session.map_err(|_| SessionError::Connect("the broker does not answer".into()))??
        }
        () = shutdown.cancelled() => return Ok(()),
    };
    tracing::info!(queue = worker.amqp.queue, "consuming");
    let _ = health.send_replace(Ok(()));
    let result = consume(worker, &channel, consumer, &outbox, health, shutdown).await;
    if result.is_ok() {
        // Closing tells the broker at once; a failure only means that it already knows.
        let _ = connection.close(200, "drained".into()).await;
    }
    result
}

async fn open(worker: &Worker) -> Result<Session, SessionError> {
    let connection = connect(&worker.amqp, "broadcastd worker: requests").await.map_err(SessionError::Connect)?;
    let channel = connection.create_channel().await?;
    topology::declare(&channel, &worker.amqp).await?;
    // Before consume: without it lapin takes the whole queue into memory.
    channel.basic_qos(worker.amqp.prefetch, BasicQosOptions::default()).await?;
    let reply_timeout = Duration::from_millis(worker.settings.reply_timeout_ms);
    let outbox = Outbox::open(&worker.amqp, reply_timeout, worker.metrics.clone()).await?;
    let consumer = channel
        .basic_consume(
            worker.amqp.queue.as_str().into(),
            "broadcastd".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await?;
    Ok(Session { connection, channel, consumer, outbox })
}

async fn consume(
    worker: &Worker,
    channel: &Channel,
    mut consumer: Consumer,
    outbox: &Outbox,
    health: &watch::Sender<Result<(), String>>,
    shutdown: &CancellationToken,
) -> Result<(), SessionError> {
    let mut work: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
    // Bounded by the prefetch.
    let mut waiting: VecDeque<Delivery> = VecDeque::new();
    let mut window = AckWindow::default();
    let mut suspects: Suspects<Delivery> = Suspects::default();
    let mut random = fastrand::Rng::new();
    let mut suspect_under_way = false;
    let mut at_ledger = 0;
    // Nothing has arrived between the last two looks, or since.
    let mut quiet = false;
    let mut arrived = false;
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    let mut consuming = true;
    while consuming || !work.is_empty() {
        let room = work.len() < worker.settings.batches_in_flight;
        let mut suspect_is_due = window.out_of_order() > MOST_OUT_OF_ORDER;
        let mut arrivals = Vec::new();
        tokio::select! {
            Some(done) = work.next() => match done {
                Done::Answered { decided, alone } => {
                    at_ledger -= 1;
                    if let Some(decided) = decided {
                        let finished = move |settled| Done::Finished { settled, alone };
                        work.push(process::finish(worker, outbox, shutdown, decided).map(finished).boxed());
                    }
                }
                Done::Finished { settled, alone } => {
                    let late = settle(channel, &mut window, settled?).await?;
                    if alone || !late.is_empty() {
                        work.push(acknowledged(worker, channel, outbox, late, alone).boxed());
                    }
                }
                Done::Acknowledged { result, alone } => {
                    result?;
                    suspect_under_way &= !alone;
                }
            },
            // Without room the stream is left alone: waking up for each delivery would cost more than deciding it.
            delivery = next(&mut consumer), if consuming && waiting.is_empty() && room => arrivals.push(delivery?),
            _ = look.tick() => {
                look_around(worker, channel, outbox, health)?;
                // Its end is how a cancelled consumer shows, and who has lost its deliveries must not go on deciding them:
                // so it is read now and then even while everything is held.
                while consuming && let Some(delivery) = next(&mut consumer).now_or_never() {
                    arrivals.push(delivery?);
                }
                quiet = !std::mem::take(&mut arrived);
                // One a look at the least, however much that is fresh keeps coming.
                suspect_is_due = true;
            },
            () = shutdown.cancelled(), if consuming => {
                consuming = false;
                // Not begun: they go back to the queue when the connection is closed.
                waiting.clear();
                suspects.clear();
                channel.basic_cancel("broadcastd".into(), BasicCancelOptions::default()).await?;
                tracing::info!(batches = work.len(), "no longer consuming; settling what is held");
            },
        }
        // What has arrived meanwhile shares the round trip.
        while consuming
            && room
            && waiting.len() + arrivals.len() < worker.settings.batch
            && let Some(delivery) = next(&mut consumer).now_or_never()
        {
            arrivals.push(delivery?);
        }
        arrived |= !arrivals.is_empty();
        quiet &= arrivals.is_empty();
        for delivery in arrivals {
            if suspects::is_suspect(&delivery.properties, delivery.redelivered, worker.amqp.delivery_limit) {
                worker.metrics.suspects.inc();
                suspects.set_aside(delivery);
            } else {
                waiting.push_back(delivery);
            }
        }
        // Bounded: a batch under way, or its late replies, each take one of the places.
        while work.len() < worker.settings.batches_in_flight
            && !waiting.is_empty()
            && (waiting.len() >= worker.settings.batch || at_ledger < ENOUGH_AT_LEDGER)
        {
            let count = waiting.len().min(worker.settings.batch);
            at_ledger += begin(worker, outbox, shutdown, &work, waiting.drain(..count), false);
        }
        let is_turn = suspect_is_due || (quiet && work.is_empty());
        if consuming
            && is_turn
            && !suspect_under_way
            && let Some(suspect) = suspects.take(&mut random)
        {
            suspect_under_way = true;
            at_ledger += begin(worker, outbox, shutdown, &work, std::iter::once(suspect), true);
        }
    }
    Ok(())
}

/// Starts on a batch; returns how many go to the ledger: one, or none. `alone`: it is a single suspect.
fn begin<'a>(
    worker: &'a Worker,
    outbox: &'a Outbox,
    shutdown: &'a CancellationToken,
    work: &FuturesUnordered<BoxFuture<'a, Done>>,
    deliveries: impl ExactSizeIterator<Item = Delivery>,
    alone: bool,
) -> usize {
    worker.metrics.consumed.inc_by(deliveries.len() as u64);
    let (rejected, submissions) = process::sort(worker, deliveries);
    if alone {
        let request_id = submissions.first().map_or("", |(_, submission)| submission.request.id.as_str());
        // The last of these lines before a crash names the culprit.
        tracing::warn!(request_id, "a request that was delivered again and again is tried alone");
    }
    if !rejected.is_empty() {
        let finished = move |settled| Done::Finished { settled, alone };
        work.push(process::finish(worker, outbox, shutdown, rejected).map(finished).boxed());
    }
    if submissions.is_empty() {
        return 0;
    }
    let answered = move |decided| Done::Answered { decided, alone };
    work.push(process::decide(worker, shutdown, submissions).map(answered).boxed());
    1
}

/// What no call would tell: a connection that died while nothing was done on it, a broker that takes no replies, and a ledger
/// that takes no requests.
fn look_around(
    worker: &Worker,
    channel: &Channel,
    outbox: &Outbox,
    health: &watch::Sender<Result<(), String>>,
) -> Result<(), SessionError> {
    if !channel.status().connected() {
        return Err(SessionError::Connection(format!("the channel of {} was lost", worker.amqp.queue)));
    }
    if !outbox.connected() {
        return Err(SessionError::Connection("the connection for replies was lost".into()));
    }
    let state = if outbox.blocked() {
        Err("the broker takes no replies (resource alarm); requests are still decided".to_owned())
    } else if worker.metrics.held.get() > 0 {
        // The ledger's own health does not tell: one that refuses writes (full, read-only) answers every probe.
        Err("the ledger refuses requests or does not answer; they are held".to_owned())
    } else {
        outbox.trouble().map_or(Ok(()), |reason| Err(format!("dead letters cannot be stored: {reason}")))
    };
    health.send_if_modified(|health| {
        let is_news = *health != state;
        *health = state;
        is_news
    });
    Ok(())
}

/// The next delivery. A stream that ends means that the server ended the consumer, however healthy the connection looks.
async fn next(consumer: &mut Consumer) -> Result<Delivery, SessionError> {
    match consumer.next().await {
        Some(delivery) => Ok(delivery?),
        None => Err(SessionError::Cancelled),
    }
}

/// Acknowledges, and returns the replies that come only after that.
async fn settle(
    channel: &Channel,
    window: &mut AckWindow,
    settled: Vec<Settle>,
) -> Result<Vec<(Item, Verdict)>, SessionError> {
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
async fn acknowledged(
    worker: &Worker,
    channel: &Channel,
    outbox: &Outbox,
    replies: Vec<(Item, Verdict)>,
    alone: bool,
) -> Done {
    // A channel's calls are carried out in order. This one changes nothing, and has an answer.
    let answer = channel.basic_qos(worker.amqp.prefetch, BasicQosOptions::default()).await;
    if let Err(error) = answer {
        return Done::Acknowledged { result: Err(error.into()), alone };
    }
    let mut sent = Vec::with_capacity(replies.len());
    for (item, verdict) in &replies {
        failpoint::reached(
            "worker::refusal-after-ack",
            item.request.as_ref().map_or("", |request| request.id.as_str()),
        );
        sent.push(outbox.reply(item, verdict).await);
    }
    outbox.replied(sent).await;
    Done::Acknowledged { result: Ok(()), alone }
}
