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
use super::process::{self, Settle};
use super::{SessionError, Worker, topology};
use crate::amqp::connect;
use crate::broadcast::verdict::Verdict;
use crate::failpoint;

/// How often the outbox is looked at: lapin tells the death of a connection only to those that use it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

enum Done {
    Decided(Result<Vec<Settle>, SessionError>),
    Replied,
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
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut consuming = true;
    while consuming || !work.is_empty() {
        let room = work.len() < worker.settings.batches_in_flight;
        tokio::select! {
            Some(done) = work.next() => if let Done::Decided(settled) = done {
                let late = settle(channel, &mut window, settled?).await?;
                if !late.is_empty() {
                    work.push(reply_late(outbox, late).boxed());
                }
            },
            // Without room the stream is left alone: waking up for each delivery would cost more than deciding it.
            delivery = next(&mut consumer), if consuming && waiting.is_empty() && room => {
                waiting.push_back(delivery?);
                // What has arrived meanwhile shares the round trip; nothing waits for a batch to fill.
                while waiting.len() < worker.settings.batch
                    && let Some(delivery) = next(&mut consumer).now_or_never()
                {
                    waiting.push_back(delivery?);
                }
            },
            _ = look.tick() => {
                look_around(worker, channel, outbox, health)?;
                // Its end is how a cancelled consumer shows, and who has lost its deliveries must not go on deciding them:
                // so it is read now and then even while everything is held.
                while consuming && let Some(delivery) = next(&mut consumer).now_or_never() {
                    waiting.push_back(delivery?);
                }
            },
            () = shutdown.cancelled(), if consuming => {
                consuming = false;
                // Not begun: they go back to the queue when the connection is closed.
                waiting.clear();
                channel.basic_cancel("broadcastd".into(), BasicCancelOptions::default()).await?;
                tracing::info!(batches = work.len(), "no longer consuming; settling what is held");
            },
        }
        // Bounded: a batch under way, or its late replies, each take one of the places.
        while !waiting.is_empty() && work.len() < worker.settings.batches_in_flight {
            let count = waiting.len().min(worker.settings.batch);
            worker.metrics.consumed.inc_by(count as u64);
            let (rejected, submissions) = process::sort(worker, waiting.drain(..count));
            if !rejected.is_empty() {
                work.push(process::finish(worker, outbox, rejected).map(Done::Decided).boxed());
            }
            if !submissions.is_empty() {
                let decided = process::decide_and_finish(worker, outbox, shutdown, submissions);
                work.push(decided.map(Done::Decided).boxed());
            }
        }
    }
    Ok(())
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
        Ok(())
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

async fn reply_late(outbox: &Outbox, replies: Vec<(Item, Verdict)>) -> Done {
    let mut sent = Vec::with_capacity(replies.len());
    for (item, verdict) in &replies {
        failpoint::reached(
            "worker::refusal-after-ack",
            item.request.as_ref().map_or("", |request| request.id.as_str()),
        );
        sent.push(outbox.reply(item, verdict).await);
    }
    outbox.replied(sent).await;
    Done::Replied
}
