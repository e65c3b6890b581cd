//! Submitting over AMQP: publish with confirm, wait for the worker's reply by direct reply-to.
//!
//! One supervised connection with one channel: a direct reply-to consumer must be on the channel that publishes. Any error
//! ends it, and it is rebuilt after a jittered pause. Nothing waits for a connection: without one, a call is answered 503.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Confirmation, Connection, ConnectionStatus, Consumer, ErrorKind};
use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::message::{REPLY_TO, encode, properties};
use super::submit::Outcome;
use crate::amqp::{AmqpSettings, Confirm, connect, describe};
use crate::backoff::Backoff;
use crate::broadcast::request::Request;
use crate::broadcast::verdict::code;
use crate::failpoint;

/// Building a session takes no longer than this.
const BUILD: Duration = Duration::from_secs(10);
/// Pauses between two builds: the first, and the most.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Sends requests to the workers.
pub struct AmqpSubmitter {
    exchange: ShortString,
    routing_key: ShortString,
    reply_timeout: Duration,
    link: watch::Receiver<Option<Arc<Link>>>,
    health: watch::Receiver<Result<(), String>>,
}

/// A built session.
struct Link {
    channel: Channel,
    status: ConnectionStatus,
    /// Calls that wait, by correlation id; as many as the API lets in at once. Dropping a sender says that the link is gone.
    /// A std Mutex, not tokio's: never held across an await.
    waiting: Mutex<HashMap<String, oneshot::Sender<Arrival>>>,
}

/// What arrives for a call.
enum Arrival {
    Reply(Vec<u8>),
    /// The broker gave the request back: no queue is bound.
    Returned,
}

impl Link {
    fn waiting(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Arrival>>> {
        // A poisoned lock only means that another call panicked; the map is whole after each step.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands something over; a late one, for which nobody waits any more, is dropped.
    fn arrive(&self, correlation: Option<&ShortString>, arrival: Arrival) {
        let waiter = correlation.and_then(|correlation| self.waiting().remove(correlation.as_str()));
        if let Some(waiter) = waiter {
            // The call may have ended this moment: late, likewise.
            let _ = waiter.send(arrival);
        }
    }
}

/// Takes a call off the list of those that wait, however it ends.
struct Waiting<'a>(&'a Link, &'a str);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(self.1);
    }
}

impl AmqpSubmitter {
    /// Starts the connection's task, which lives until `shutdown`; returns at once.
    #[must_use]
    pub fn start(settings: AmqpSettings, reply_timeout: Duration, shutdown: CancellationToken) -> Self {
        let (link_sender, link) = watch::channel(None);
        let (health_sender, health) = watch::channel(Err("not connected yet".to_owned()));
        let (exchange, routing_key) = (settings.exchange.as_str().into(), settings.routing_key.as_str().into());
        tokio::spawn(supervise(settings, link_sender, health_sender, shutdown));
        Self { exchange, routing_key, reply_timeout, link, health }
    }

    /// Whether requests can be sent, as a sentence if not.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Result<(), String>> {
        self.health.clone()
    }

    pub(super) async fn submit(&self, request: &Request) -> Outcome {
        let Some(link) = self.link.borrow().clone() else {
            return Outcome::Busy("the message broker is not connected");
        };
        if link.status.blocked() {
            return Outcome::Busy("the message broker is short of memory or disk");
        }
        let Ok(payload) = encode(request) else { return Outcome::Busy("the request cannot be encoded") };
        let correlation = Uuid::new_v4().to_string();
        let (sender, mut arrival) = oneshot::channel();
        link.waiting().insert(correlation.clone(), sender);
        let _waiting = Waiting(&link, &correlation);
        let deadline = Instant::now() + self.reply_timeout;
        // Mandatory: a request that no queue takes comes back, instead of vanishing with a confirm.
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let publish = link.channel.basic_publish(
            self.exchange.clone(),
            self.routing_key.clone(),
            options,
            &payload,
            properties(request, &correlation),
        );
        let mut confirm = match timeout_at(deadline, publish).await {
            Ok(Ok(confirm)) => Confirm::from(confirm),
            Ok(Err(error)) if never_sent(&error) => return Outcome::Busy("the message broker is not connected"),
            Ok(Err(_)) => return Outcome::Unknown(LOST),
            Err(_) => return Outcome::Unknown("the message broker did not take the request in time"),
        };
        let mut confirmed = false;
        loop {
            tokio::select! {
                arrived = &mut arrival => return match arrived {
                    Ok(Arrival::Reply(bytes)) => read(&bytes),
                    Ok(Arrival::Returned) => Outcome::Busy(NO_QUEUE),
                    // The link is gone.
                    Err(_) => Outcome::Unknown(LOST),
                },
                confirmation = &mut confirm, if !confirmed => match confirmation {
                    Ok(Confirmation::Nack(_)) => return Outcome::Busy("the message broker refused the request"),
                    Ok(Confirmation::NotRequested | Confirmation::Ack(None)) => {
                        confirmed = true;
                        failpoint::reached("api::after-enqueue", request.id.as_str());
                    }
                    Ok(Confirmation::Ack(Some(returned))) => {
                        confirmed = true;
                        // lapin hands a returned message to whichever confirm resolves next, which under load is often
                        // another call's: its correlation id says whose it is.
                        link.arrive(returned.properties.correlation_id().as_ref(), Arrival::Returned);
                    }
                    // Whatever it says: an error closes the channel for all calls, and which of them it was about, and
                    // which had got to the queue before, cannot be told.
                    Err(_) => return Outcome::Unknown(LOST),
                },
                () = tokio::time::sleep_until(deadline) => {
                    return Outcome::Unknown("no worker has replied in time");
                }
            }
        }
    }
}

const LOST: &str = "the connection to the message broker was lost";
const NO_QUEUE: &str = "no worker queue: the exchange has no queue bound for requests";

/// The error came before anything was handed to the connection.
fn never_sent(error: &lapin::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) | ErrorKind::InvalidChannel(_)
    )
}

/// The worker's reply. One that cannot be read says nothing about the request.
fn read(bytes: &[u8]) -> Outcome {
    let reply: Option<Value> = serde_json::from_slice(bytes).ok();
    let code = reply.as_ref().and_then(|reply| u16::try_from(reply.get("code")?.as_u64()?).ok());
    match (reply, code) {
        (Some(reply), Some(code)) => {
            let id = reply["msg"]["broadcastId"].as_u64().filter(|_| code == code::OK);
            Outcome::Decided { code, id, reply }
        }
        _ => Outcome::Unknown("the worker's reply is unreadable"),
    }
}

/// Builds sessions until `shutdown`.
async fn supervise(
    settings: AmqpSettings,
    link: watch::Sender<Option<Arc<Link>>>,
    health: watch::Sender<Result<(), String>>,
    shutdown: CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let built = tokio::select! {
            built = timeout(BUILD, build(&settings)) => built,
            () = shutdown.cancelled() => return,
        };
        let problem = match built {
            Ok(Ok((connection, built, consumer))) => {
                let built = Arc::new(built);
                link.send_replace(Some(Arc::clone(&built)));
                let _ = health.send_replace(Ok(()));
                tracing::info!("connected to the message broker");
                backoff.reset();
                let problem = tokio::select! {
                    problem = run(&connection, &built, consumer, &health) => problem,
                    () = shutdown.cancelled() => {
                        link.send_replace(None);
                        let _ = timeout(Duration::from_secs(1), connection.close(200, "shutting down".into())).await;
                        return;
                    }
                };
                link.send_replace(None);
                // Whoever waits is told now that the outcome is unknown.
                built.waiting().clear();
                drop(built);
                let _ = timeout(Duration::from_secs(1), connection.close(200, "rebuilding".into())).await;
                problem
            }
            Ok(Err(problem)) => problem,
            Err(_) => "it did not answer in time".to_owned(),
        };
        tracing::warn!(problem, "the message broker is unavailable; connecting again");
        let _ = health.send_replace(Err(problem));
        tokio::select! {
            () = backoff.wait() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

async fn build(settings: &AmqpSettings) -> Result<(Connection, Link, Consumer), String> {
    let connection = connect(settings, "broadcastd api").await?;
    prepare(settings, connection).await.map_err(|error| describe(&error))
}

async fn prepare(
    settings: &AmqpSettings,
    connection: Connection,
) -> Result<(Connection, Link, Consumer), lapin::Error> {
    let channel = connection.create_channel().await?;
    // Passive: the workers declare the topology; without the exchange every publish would close the channel.
    let passive = ExchangeDeclareOptions { passive: true, durable: true, ..Default::default() };
    let (exchange, kind) = (settings.exchange.as_str().into(), lapin::ExchangeKind::Direct);
    channel.exchange_declare(exchange, kind, passive, FieldTable::default()).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    // Before the first publish, on the same channel, and without acks: direct reply-to demands all three.
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consumer = channel.basic_consume(REPLY_TO.into(), "replies".into(), options, FieldTable::default()).await?;
    let status = connection.status().clone();
    Ok((connection, Link { channel, status, waiting: Mutex::default() }, consumer))
}

/// Hands replies over and watches the connection until it ends; says why it did.
async fn run(
    connection: &Connection,
    link: &Link,
    mut replies: Consumer,
    health: &watch::Sender<Result<(), String>>,
) -> String {
    let mut events = std::pin::pin!(connection.events_listener());
    loop {
        tokio::select! {
            delivery = replies.next() => match delivery {
                Some(Ok(delivery)) => {
                    let correlation = delivery.properties.correlation_id().clone();
                    link.arrive(correlation.as_ref(), Arrival::Reply(delivery.data));
                }
                Some(Err(error)) => return describe(&error),
                None => return "the reply consumer was cancelled".to_owned(),
            },
            event = events.next() => match event {
                Some(lapin::Event::ConnectionBlocked(_)) => {
                    tracing::warn!("the message broker blocks publishers: it is short of memory or disk");
                    let _ = health.send_replace(Err("it is short of memory or disk and blocks publishers".to_owned()));
                }
                Some(lapin::Event::ConnectionUnblocked) => {
                    tracing::info!("the message broker takes requests again");
                    let _ = health.send_replace(Ok(()));
                }
                Some(lapin::Event::Error(error)) => return describe(&error),
                Some(_) => {}
                None => return "the connection ended".to_owned(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_passed_on_and_nonsense_is_no_verdict() {
        let Outcome::Decided { code: 200, id: Some(7), .. } = read(br#"{"code":200,"msg":{"broadcastId":7}}"#) else {
            panic!("accepted")
        };
        assert!(matches!(read(br#"{"code":416,"desc":"x"}"#), Outcome::Decided { code: 416, id: None, .. }));
        for nonsense in [&b""[..], b"{}", b"\xff", br#"{"code":"200"}"#, br#"{"code":99999999}"#] {
            assert!(matches!(read(nonsense), Outcome::Unknown(_)));
        }
    }
}
