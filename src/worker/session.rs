//! One session with the broker: connect, declare, consume, settle, until something breaks or the worker is told to stop.

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
    let result = consume(worker, &channel, consumer, &outbox, shutdown).await;
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
    shutdown: &CancellationToken,
) -> Result<(), SessionError> {
    let mut work: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
    let mut window = AckWindow::default();
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut consuming = true;
    while consuming || !work.is_empty() {
        // Bounded: a batch under way, or its late replies, each take one of the places.
        let room = work.len() < worker.settings.batches_in_flight;
        tokio::select! {
            Some(done) = work.next() => if let Done::Decided(settled) = done {
                let late = settle(channel, &mut window, settled?).await?;
                if !late.is_empty() {
                    work.push(reply_late(outbox, late).boxed());
                }
            },
            delivery = next(&mut consumer), if consuming && room => {
                let mut deliveries = Vec::with_capacity(worker.settings.batch);
                deliveries.push(delivery?);
                // What has arrived meanwhile shares the round trip; nothing waits for a batch to fill.
                while deliveries.len() < worker.settings.batch
                    && let Some(delivery) = next(&mut consumer).now_or_never()
                {
                    deliveries.push(delivery?);
                }
                worker.metrics.consumed.inc_by(deliveries.len() as u64);
                work.push(process::batch(worker, outbox, deliveries).map(Done::Decided).boxed());
            },
            _ = look.tick() => if !outbox.connected() {
                return Err(SessionError::Connection("the connection for replies was lost".into()));
            },
            () = shutdown.cancelled(), if consuming => {
                consuming = false;
                channel.basic_cancel("broadcastd".into(), BasicCancelOptions::default()).await?;
                tracing::info!(batches = work.len(), "no longer consuming; settling what is held");
            },
        }
    }
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
        sent.push(outbox.reply(item, verdict).await);
    }
    for sent in sent {
        outbox.replied(sent).await;
    }
    Done::Replied
}
