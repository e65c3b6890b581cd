//! One session with the broker: connect, declare, consume, settle, until something breaks or the worker is told to stop.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::acks::AckWindow;
use super::held::{Again, Held};
use super::outbox::Outbox;
use super::process::{self, Answered, Decided, Settle};
use super::replies::Replies;
use super::suspects::{self, Suspects};
use super::{SessionError, Worker, topology};
use crate::amqp::connect;

/// How often the outbox is looked at: lapin tells the death of a connection only to those that use it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// So many may be acknowledged past one that waits; beyond it suspects are no longer made to wait for what is fresh.
const MOST_OUT_OF_ORDER: u64 = 100_000;

/// With so many batches at the ledger another one that is not full waits for more: it would only be another round trip.
const ENOUGH_AT_LEDGER: usize = 2;

/// A step that was done; `alone`: with a single suspect.
enum Done {
    /// The ledger was asked; `again`: about what is held.
    Answered { answered: Answered, again: bool, alone: bool },
    /// These may be settled, those are for the dead letters.
    Finished { settled: Vec<Settle>, dead: Decided, alone: bool },
    /// The same of dead letters, of which some may not be stored.
    Buried { result: Result<(Vec<Settle>, Decided), SessionError>, alone: bool },
    /// Acknowledged, and told what comes only after that.
    Told { result: Result<(), SessionError>, alone: bool },
}

/// Dead letters that wait for the one attempt that is under way; bounded by the prefetch, as they are not acknowledged.
#[derive(Default)]
struct Dead {
    waiting: Decided,
    storing: bool,
    /// A suspect is among those that wait.
    suspect: bool,
}

/// How long it may take from connecting to consuming. A broker that is booting answers some calls and leaves others hanging.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);

struct Session<'a> {
    connection: Connection,
    channel: Channel,
    consumer: Consumer,
    outbox: Outbox<'a>,
}

/// Runs a session. `Ok` after an orderly stop.
pub(super) async fn run(
    worker: &Worker,
    replies: &Replies,
    health: &watch::Sender<Result<(), String>>,
    shutdown: &CancellationToken,
) -> Result<(), SessionError> {
    let Session { connection, channel, consumer, outbox } = tokio::select! {
        session = tokio::time::timeout(SETUP_TIMEOUT, open(worker, replies)) => {
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

async fn open<'a>(worker: &Worker, replies: &'a Replies) -> Result<Session<'a>, SessionError> {
    let connection = connect(&worker.amqp, "broadcastd worker: requests").await.map_err(SessionError::Connect)?;
    let channel = connection.create_channel().await?;
    topology::declare(&channel, &worker.amqp).await?;
    // Before consume: without it lapin takes the whole queue into memory.
    channel.basic_qos(worker.amqp.prefetch, BasicQosOptions::default()).await?;
    let reply_timeout = Duration::from_millis(worker.settings.reply_timeout_ms);
    let outbox = Outbox::open(&worker.amqp, reply_timeout, worker.metrics.clone(), replies).await?;
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
    outbox: &Outbox<'_>,
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
    let mut held = Held::new(&worker.metrics.held);
    let mut dead = Dead::default();
    // Steps that take none of the places of fresh batches: a question about what is held, an attempt to store dead letters.
    let mut apart = 0;
    // Nothing has arrived between the last two looks, or since.
    let mut quiet = false;
    let mut arrived = false;
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    let mut consuming = true;
    while consuming || !work.is_empty() {
        let room = work.len() - apart < worker.settings.batches_in_flight;
        let mut suspect_is_due = window.out_of_order() > MOST_OUT_OF_ORDER;
        let mut arrivals = Vec::new();
        tokio::select! {
            Some(done) = work.next() => match done {
                Done::Answered { answered: Answered { decided, open, error }, again, alone } => {
                    if again {
                        apart -= 1;
                    } else {
                        at_ledger -= 1;
                    }
                    if let Some(error) = error.filter(|_| held.is_empty()) {
                        tracing::warn!(%error, "requests are held until the ledger answers");
                    }
                    if !open.is_empty() && alone {
                        // While it is held, other suspects have their turn.
                        suspect_under_way = false;
                    }
                    let is_away = decided.is_empty();
                    let count = open.len();
                    let open = if consuming { open } else { Vec::new() };
                    if again {
                        held.tried(open, alone);
                    } else {
                        held.hold(open, alone);
                    }
                    if !consuming && count > 0 {
                        let requests = count + if is_away { held.give_back() } else { 0 };
                        tracing::warn!(requests, "stopping while the ledger does not answer: given back to the queue");
                    }
                    if !decided.is_empty() {
                        work.push(finished(worker, outbox, decided, alone && !again));
                    }
                }
                Done::Finished { settled, dead: more, alone } => {
                    let is_settled = more.is_empty();
                    dead.waiting.extend(more);
                    dead.suspect |= alone && !is_settled;
                    let late = process::settle(channel, &mut window, settled).await?;
                    if (alone && is_settled) || !late.is_empty() {
                        work.push(told(worker, channel, outbox, late, alone && is_settled));
                    }
                }
                Done::Buried { result, alone } => {
                    apart -= 1;
                    dead.storing = false;
                    let (settled, left) = result?;
                    // Behind the others: what cannot be stored must not keep those back.
                    if consuming {
                        dead.waiting.extend(left);
                    }
                    // Where it has to wait, other suspects have their turn.
                    let is_settled = !settled.is_empty();
                    suspect_under_way &= is_settled || !alone;
                    let late = process::settle(channel, &mut window, settled).await?;
                    if (alone && is_settled) || !late.is_empty() {
                        work.push(told(worker, channel, outbox, late, alone && is_settled));
                    }
                }
                Done::Told { result, alone } => {
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
                tracing::info!(steps = work.len(), "no longer consuming; settling what is held");
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
        while work.len() - apart < worker.settings.batches_in_flight
            && !waiting.is_empty()
            && (waiting.len() >= worker.settings.batch || at_ledger < ENOUGH_AT_LEDGER)
        {
            let count = waiting.len().min(worker.settings.batch);
            at_ledger += begin(worker, outbox, &work, waiting.drain(..count), false);
        }
        let is_turn = suspect_is_due || (quiet && work.len() == apart);
        if consuming
            && is_turn
            && !suspect_under_way
            && let Some(suspect) = suspects.take(&mut random)
        {
            suspect_under_way = true;
            at_ledger += begin(worker, outbox, &work, std::iter::once(suspect), true);
        }
        if let Some(Again { requests, alone, delay }) = held.again(worker.settings.batch) {
            apart += 1;
            let answered = move |answered| Done::Answered { answered, again: true, alone };
            work.push(process::decide_again(worker, shutdown, delay, requests).map(answered).boxed());
        }
        if !dead.storing && !dead.waiting.is_empty() {
            apart += 1;
            dead.storing = true;
            let alone = std::mem::take(&mut dead.suspect);
            let count = dead.waiting.len().min(worker.settings.batch);
            let buried = move |result| Done::Buried { result, alone };
            work.push(process::bury(outbox, shutdown, dead.waiting.drain(..count).collect()).map(buried).boxed());
        }
    }
    Ok(())
}

/// Starts on a batch; returns how many go to the ledger: one, or none. `alone`: it is a single suspect.
fn begin<'a>(
    worker: &'a Worker,
    outbox: &'a Outbox<'a>,
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
        work.push(finished(worker, outbox, rejected, alone));
    }
    if submissions.is_empty() {
        return 0;
    }
    let answered = move |answered| Done::Answered { answered, again: false, alone };
    work.push(process::decide(worker, submissions).map(answered).boxed());
    1
}

fn finished<'a>(worker: &'a Worker, outbox: &'a Outbox<'a>, decided: Decided, alone: bool) -> BoxFuture<'a, Done> {
    process::finish(worker, outbox, decided).map(move |(settled, dead)| Done::Finished { settled, dead, alone }).boxed()
}

fn told<'a>(
    worker: &'a Worker,
    channel: &'a Channel,
    outbox: &'a Outbox<'a>,
    late: Decided,
    alone: bool,
) -> BoxFuture<'a, Done> {
    process::tell_late(worker, channel, outbox, late).map(move |result| Done::Told { result, alone }).boxed()
}

/// What no call would tell: a connection that died while nothing was done on it, a broker that takes no replies, and a ledger
/// that takes no requests.
fn look_around(
    worker: &Worker,
    channel: &Channel,
    outbox: &Outbox<'_>,
    health: &watch::Sender<Result<(), String>>,
) -> Result<(), SessionError> {
    if !channel.status().connected() {
        return Err(SessionError::Connection(format!("the channel of {} was lost", worker.amqp.queue)));
    }
    if !outbox.connected() {
        return Err(SessionError::Connection("the connection for dead letters was lost".into()));
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
