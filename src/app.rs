//! The composition root: the only place that sees all settings and knows every part. Loading opens nothing, building opens,
//! running spawns.

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Dependency};
use crate::api::amqp::AmqpSubmitter;
use crate::api::submit::{DirectSubmitter, Submitter};
use crate::api::{self, Api, serve};
use crate::broadcast::app::Directory;
use crate::ledger::Ledger;
use crate::ledger::embedded::{EmbeddedLedger, system_clock};
use crate::ledger::redis::RedisLedger;
use crate::metrics::Metrics;
use crate::node::pages::MOST_FILES;
use crate::node::{self, Node, NodeSettings};
use crate::settings::{DrainSettings, Settings, SettingsError};
use crate::worker::Worker;

/// Non-WebSocket connections that may wait to be taken over; further ones are answered 503 by the node.
const HAND_OFF_CAPACITY: usize = 256;

/// How long the calls under way on the admin port may take at the end.
const ADMIN_END: Duration = Duration::from_secs(1);

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The server API.
    Api,
    /// The queue's consumer.
    Worker,
    /// The devices' WebSockets.
    Node,
    /// All of it in one process, without RabbitMQ and Redis.
    Standalone,
    /// Standalone with a store in memory.
    Demo,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Worker => "worker",
            Self::Node => "node",
            Self::Standalone => "standalone",
            Self::Demo => "demo",
        }
    }
}

/// A part that runs: what it depends on, and its end.
struct Running {
    dependencies: Vec<Dependency>,
    /// Where it listens for the public, if it does.
    public: Option<SocketAddr>,
    /// Ends some time after the token is cancelled, or by itself if it fails.
    end: BoxFuture<'static, anyhow::Result<()>>,
}

/// Runs a role until SIGTERM or SIGINT, then drains it. `beside` runs next to it once it listens, and may end it.
///
/// # Errors
/// A sentence: something cannot be opened, or a part failed.
pub async fn run<F, B>(role: Role, settings: Settings, beside: F) -> anyhow::Result<()>
where
    F: FnOnce(Option<SocketAddr>) -> B,
    B: Future<Output = anyhow::Result<()>>,
{
    let directory = settings.directory()?;
    if directory.is_empty() {
        let sentence = "no apps are configured: add an [[apps]] table to the settings (or try --dev)";
        return Err(SettingsError::new(sentence).into());
    }
    let metrics = Metrics::new()?;
    metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), role.name()]).set(1);
    let admin_listener = bind(settings.listen.admin, "listen.admin")?;
    let stop = CancellationToken::new();
    let drain = settings.drain.clone();
    let running = start(role, settings, directory, &metrics, &stop).await?;

    let (draining, is_draining) = watch::channel(false);
    let admin_stop = CancellationToken::new();
    let admin = tokio::spawn(serve::serve(
        tokio::net::TcpListener::from_std(admin_listener)?,
        admin::router(running.dependencies, is_draining, metrics),
        admin_stop.clone(),
    ));
    tracing::info!(role = role.name(), version = env!("CARGO_PKG_VERSION"), "started");
    let result = live(running.end, beside(running.public), &drain, &draining, &stop).await;
    admin_stop.cancel();
    // Whoever stalls on the admin port must not keep a drained process alive.
    let _ = tokio::time::timeout(ADMIN_END, admin).await;
    tracing::info!(role = role.name(), "stopped");
    result
}

/// Waits for the end of the part, or for a signal and then, under the deadline, for the end of the part.
async fn live(
    mut end: BoxFuture<'static, anyhow::Result<()>>,
    beside: impl Future<Output = anyhow::Result<()>>,
    drain: &DrainSettings,
    draining: &watch::Sender<bool>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut outcome = Ok(());
    let notice = tokio::select! {
        result = &mut end => return result,
        result = beside => { outcome = result; Duration::ZERO }
        _ = terminate.recv() => Duration::from_secs(drain.notice_seconds),
        // Somebody at a terminal: no balancer has to notice.
        _ = interrupt.recv() => Duration::ZERO,
    };
    let _ = draining.send_replace(true);
    tracing::info!(notice_seconds = notice.as_secs(), deadline_seconds = drain.deadline_seconds, "draining");
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        tracing::warn!("second signal: leaving at once");
        std::process::exit(1);
    });
    tokio::select! {
        result = &mut end => return result,
        () = tokio::time::sleep(notice) => {}
    }
    stop.cancel();
    let deadline = Duration::from_secs(drain.deadline_seconds);
    match tokio::time::timeout(deadline, end).await {
        Ok(result) => result.and(outcome),
        Err(_) => Err(anyhow!("not drained within {} s; leaving all the same", deadline.as_secs())),
    }
}

async fn start(
    role: Role,
    settings: Settings,
    directory: Directory,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<Running> {
    survive_the_file_size_limit()?;
    match role {
        Role::Api => start_api(settings, directory, metrics, stop),
        Role::Worker => Ok(start_worker(settings, directory, metrics, stop)),
        Role::Node => start_node(settings, &directory, metrics, stop),
        Role::Standalone => {
            let ledger = EmbeddedLedger::open(&settings.embedded, settings.ledger, system_clock())?;
            start_standalone(settings, directory, Arc::new(ledger), metrics, stop)
        }
        Role::Demo => {
            let ledger = EmbeddedLedger::in_memory(settings.ledger, system_clock())?;
            start_standalone(settings, directory, Arc::new(ledger), metrics, stop)
        }
    }
}

fn start_worker(settings: Settings, directory: Directory, metrics: &Metrics, stop: &CancellationToken) -> Running {
    let ledger: Arc<dyn Ledger> = Arc::new(RedisLedger::start(settings.redis, settings.ledger));
    let (health, amqp) = watch::channel(Err("not connected yet".to_owned()));
    let redis = ledger.health();
    let worker = Worker { settings: settings.worker, amqp: settings.amqp, directory, ledger, metrics: metrics.clone() };
    let end = worker.run(health, stop.clone()).map(Ok).boxed();
    Running { dependencies: vec![("redis", redis), ("amqp", amqp)], public: None, end }
}

fn start_api(
    settings: Settings,
    directory: Directory,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<Running> {
    let listener = bind(settings.listen.public, "listen.public")?;
    let public = Some(listener.local_addr()?);
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let ledger: Arc<dyn Ledger> = Arc::new(RedisLedger::start(settings.redis, settings.ledger));
    // Its own token: the connection to the broker must outlive the calls that are under way when intake stops.
    let broker_stop = CancellationToken::new();
    let submitter = AmqpSubmitter::start(settings.amqp, settings.api.reply_timeout(), broker_stop.clone());
    let dependencies = vec![("redis", ledger.health()), ("amqp", submitter.health())];
    let api = Api::new(settings.api, directory, ledger, Submitter::Amqp(submitter), metrics.clone());
    let stop = stop.clone();
    let end = async move {
        serve::serve(listener, api::router(Arc::new(api)), stop).await;
        broker_stop.cancel();
        Ok(())
    };
    Ok(Running { dependencies, public, end: end.boxed() })
}

fn start_node(
    settings: Settings,
    directory: &Directory,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<Running> {
    let listeners = bind_node(&settings)?;
    let ledger: Arc<dyn Ledger> = Arc::new(RedisLedger::start(settings.redis, settings.ledger));
    let redis = ledger.health();
    // Never cancelled by the drain: the node ends its sessions by itself.
    let abort = CancellationToken::new();
    let node_settings = bound_sessions(settings.node, RESERVED_DESCRIPTORS);
    let node = Node::start(node_settings, directory, ledger, metrics.clone(), listeners, None, &abort)?;
    let dependencies = vec![("redis", redis), ("node", node.ready())];
    let public = Some(node.local_addr());
    let end = drain_node(node, metrics.clone(), settings.drain, stop.clone()).boxed();
    Ok(Running { dependencies, public, end })
}

fn start_standalone(
    settings: Settings,
    directory: Directory,
    ledger: Arc<dyn Ledger>,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<Running> {
    let listeners = bind_node(&settings)?;
    let (hand_off, handed_over) = mpsc::channel(HAND_OFF_CAPACITY);
    let health = ledger.health();
    let abort = CancellationToken::new();
    let node = Node::start(
        bound_sessions(settings.node, RESERVED_DESCRIPTORS + HTTP_DESCRIPTORS),
        &directory,
        ledger.clone(),
        metrics.clone(),
        listeners,
        Some(hand_off),
        &abort,
    )?;
    let dependencies = vec![("store", health), ("node", node.ready())];
    let public = Some(node.local_addr());
    let direct = DirectSubmitter::new(ledger.clone(), metrics.clone(), settings.api.reply_timeout());
    let api = Api::new(settings.api, directory, ledger, Submitter::Direct(direct), metrics.clone());
    let http = tokio::spawn(serve::serve_handed_over(handed_over, api::router(Arc::new(api)), stop.clone()));
    let drained = drain_node(node, metrics.clone(), settings.drain, stop.clone());
    let end = async move {
        drained.await?;
        http.await.context("the HTTP server failed")
    };
    Ok(Running { dependencies, public, end: end.boxed() })
}

/// Waits for the token, then sends the devices away: as slowly as the deadline allows, but no slower than needed.
/// A node of which a part has failed serves nobody: the process ends, and its supervisor starts another.
async fn drain_node(node: Node, metrics: Metrics, drain: DrainSettings, stop: CancellationToken) -> anyhow::Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = node.ended() => return Err(anyhow!("a part of the node failed; see the log")),
    }
    let sessions = u64::try_from(metrics.sessions.get()).unwrap_or(0);
    // A second is kept back for giving the leases up.
    let longest = drain.deadline_seconds.saturating_sub(1).max(1);
    let window = (sessions / u64::from(drain.leaves_per_second)).clamp(1, longest);
    node.drain(Instant::now() + Duration::from_secs(window)).await;
    Ok(())
}

/// A limit on the size of files (`ulimit -f`, `LimitFSIZE=`) would kill the process at the first write past it. With a handler
/// the write fails instead, as on a full disk, and the ledger goes on when there is room.
fn survive_the_file_size_limit() -> anyhow::Result<()> {
    // Installed for good: dropping the stream does not take the handler away.
    let _ = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?;
    Ok(())
}
/// How many connections may wait to be accepted: with the usual 128, all others of a storm would be left to their system's retries,
/// seconds apart. The system caps it (`net.core.somaxconn`, usually 4096).
const BACKLOG: i32 = 65_535;

/// Descriptors that are not for devices: Redis, files.
const RESERVED_DESCRIPTORS: u64 = 256;

/// Descriptors of HTTP connections, where devices share a port with them: served, being refused, waiting to be taken over. The node
/// does not count these any more.
const HTTP_DESCRIPTORS: u64 = (serve::MAX_CONNECTIONS + serve::MAX_REFUSED + HAND_OFF_CAPACITY) as u64;

/// Raises the soft limit of open files to the hard one: the usual soft limit of 1024 is about a thousand devices.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let can_grow = limit.current.is_some_and(|current| limit.maximum.is_none_or(|maximum| current < maximum));
    if can_grow
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

/// No more connections than the descriptors allow: a node that is full says 503, one without descriptors says nothing.
fn bound_sessions(mut settings: NodeSettings, reserved: u64) -> NodeSettings {
    // A shard has a listener, a poll and a bell. What is retained can do without files.
    let shards = 3 * settings.shard_count() as u64;
    let (needed, reserved) = (RESERVED_DESCRIPTORS + shards, reserved + shards + MOST_FILES as u64);
    let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current else { return settings };
    let room = room_for_devices(limit, reserved, needed);
    if settings.max_sessions > room {
        tracing::info!(limit, max_sessions = room, "the limit of open files bounds the connections");
        settings.max_sessions = room;
    }
    settings
}

/// How many devices a limit of open files leaves room for. A low one is shared: half of it is theirs, as long as the rest is enough
/// for what must be open (`needed`).
fn room_for_devices(limit: u64, reserved: u64, needed: u64) -> usize {
    let left = limit.saturating_sub(reserved).max((limit / 2).min(limit.saturating_sub(needed)));
    usize::try_from(left.max(1)).unwrap_or(usize::MAX)
}

/// Binds, so that a port in use is one clear sentence.
fn bind(address: SocketAddr, setting: &str) -> anyhow::Result<TcpListener> {
    bind_all(address, setting, 1)?.pop().context("no listener")
}

/// A listener for each shard.
fn bind_node(settings: &Settings) -> anyhow::Result<Vec<TcpListener>> {
    bind_all(settings.listen.public, "listen.public", settings.node.shard_count())
}

fn bind_all(address: SocketAddr, setting: &str, count: usize) -> anyhow::Result<Vec<TcpListener>> {
    node::listen(address, count, BACKLOG).map_err(|error| {
        anyhow!("cannot listen on {address}: {error}; free the port or choose another with --set {setting}=HOST:PORT")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_connections_have_descriptors_of_their_own() {
        let standalone = RESERVED_DESCRIPTORS + HTTP_DESCRIPTORS;
        assert!(standalone >= 256 + 2048 + 64);
        for limit in [8192, 65_536, 1 << 20] {
            assert_eq!(room_for_devices(limit, standalone, RESERVED_DESCRIPTORS) as u64, limit - standalone, "{limit}");
            assert_eq!(
                room_for_devices(limit, RESERVED_DESCRIPTORS, RESERVED_DESCRIPTORS) as u64,
                limit - RESERVED_DESCRIPTORS,
                "{limit}"
            );
        }
        assert_eq!(
            [100, 300, 1024, 4096].map(|limit| room_for_devices(limit, standalone, RESERVED_DESCRIPTORS)),
            [1, 44, 512, 2048]
        );
        // 64 shards need 192 more.
        let needed = RESERVED_DESCRIPTORS + 192;
        assert_eq!([512, 1024].map(|limit| room_for_devices(limit, needed + 128, needed)), [64, 512]);
    }
}
