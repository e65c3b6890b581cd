//! How a connection to Redis is made, in each of the three set-ups, and how it is probed.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::{AsyncPushSender, ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo};
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    ProtocolVersion, RedisError, RedisFuture, RedisResult, TlsCertificates, Value,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::sentinels::{self, Address, Sentinels};
use crate::ledger::Generation;
use crate::tls::{TlsFiles, advice};

/// How Redis is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One server (or a proxy in front of one).
    Single,
    /// A master that Sentinels name; `url` lists the Sentinels.
    Sentinel,
    /// Redis Cluster; `url` lists some of its nodes.
    Cluster,
}

/// Section `[redis]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedisSettings {
    /// `redis://[user:password@]host:port[/db]`, `rediss://` for TLS; several, separated by commas, for sentinel and cluster.
    pub url: SecretString,
    /// A file that holds the URL, instead; read by the settings loader.
    pub url_file: String,
    /// The set-up.
    pub mode: Mode,
    /// The name under which the Sentinels know the master.
    pub sentinel_service: String,
    /// The user for the Sentinels themselves, where they have users; empty: the default one.
    pub sentinel_username: String,
    /// The password for the Sentinels themselves, if they ask for one.
    pub sentinel_password: SecretString,
    /// A file that holds that password, instead; read by the settings loader.
    pub sentinel_password_file: String,
    /// In front of every key and channel.
    pub key_prefix: String,
    /// A PEM file with the certificate authority to trust for TLS, instead of the system's.
    pub ca_file: String,
    /// A PEM file with the certificate that this client shows to Redis, where that wants one.
    #[serde(default)]
    pub client_certificate_file: String,
    /// A PEM file with its private key.
    #[serde(default)]
    pub client_key_file: String,
    /// Time to connect, milliseconds.
    pub connect_timeout_ms: u64,
    /// Time to answer, milliseconds. A call that takes longer counts as unknown, and is repeated.
    pub response_timeout_ms: u64,
    /// Tests only: read the time (µs) from this key instead of Redis' clock.
    #[serde(skip)]
    pub test_clock_key: Option<String>,
}

/// A connection in any of the set-ups.
#[derive(Clone)]
pub(super) enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(connection) => connection.req_packed_command(cmd),
            Self::Cluster(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(connection) => connection.req_packed_commands(pipeline, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Single(connection) => connection.get_db(),
            Self::Cluster(connection) => connection.get_db(),
        }
    }
}

impl RedisSettings {
    fn urls(&self) -> Vec<&str> {
        self.url.expose_secret().split(',').map(str::trim).filter(|url| !url.is_empty()).collect()
    }

    fn tcp() -> TcpSettings {
        // Off by default in the crate: an accept would wait for the last one's TCP acknowledgement.
        TcpSettings::default().set_nodelay(true)
    }

    fn infos(&self) -> RedisResult<Vec<ConnectionInfo>> {
        self.urls()
            .into_iter()
            .map(|url| {
                let info = url.into_connection_info()?.set_tcp_settings(Self::tcp());
                let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
                Ok(info.set_redis_settings(redis))
            })
            .collect()
    }

    fn tls_files(&self) -> TlsFiles<'_> {
        let (certificate, key) = (&self.client_certificate_file, &self.client_key_file);
        TlsFiles { section: "redis", ca: &self.ca_file, certificate, key }
    }

    fn certificates(&self) -> RedisResult<Option<TlsCertificates>> {
        if !self.tls_files().any() {
            return Ok(None);
        }
        let pem = self.tls_files().read().map_err(std::io::Error::other)?;
        let client_tls = pem.identity.map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key });
        Ok(Some(TlsCertificates { client_tls, root_cert: pem.ca }))
    }

    pub(super) fn client(&self, info: ConnectionInfo) -> RedisResult<Client> {
        match self.certificates()? {
            Some(certificates) => Client::build_with_tls(info, certificates),
            None => Client::open(info),
        }
    }

    /// Checks what can be checked without connecting.
    ///
    /// # Errors
    /// A sentence, without the URL.
    pub fn validate(&self) -> Result<(), String> {
        let infos = self.infos().map_err(|_| "redis.url is not a Redis URL".to_owned())?;
        if infos.is_empty() {
            return Err("redis.url is empty".into());
        }
        let plain = infos.iter().any(|info| !matches!(info.addr(), ConnectionAddr::TcpTls { .. }));
        if self.tls_files().any() && plain {
            return Err("redis.ca_file or a client certificate is set, but redis.url is no rediss:// address".into());
        }
        self.tls_files().read()?;
        if self.mode == Mode::Single && infos.len() > 1 {
            return Err("redis.url lists several servers, but redis.mode is single".into());
        }
        if ![self.connect_timeout_ms, self.response_timeout_ms].iter().all(|ms| (1..=600_000).contains(ms)) {
            return Err("redis.connect_timeout_ms and redis.response_timeout_ms are from 1 to 600000".into());
        }
        Ok(())
    }

    /// Who is to be asked for the master, if anyone is.
    ///
    /// # Errors
    /// The URLs, or a certificate file.
    pub(super) fn sentinels(&self) -> RedisResult<Option<Sentinels>> {
        if self.mode != Mode::Sentinel {
            return Ok(None);
        }
        Ok(Some(Sentinels::new(self, &self.infos()?)))
    }

    /// Opens a connection. `push`: where pub/sub messages go, if there will be any. `master`: where the Sentinels say that it
    /// is; otherwise `redis.url` says it.
    pub(super) async fn open<S: AsyncPushSender>(
        &self,
        push: Option<S>,
        master: Option<&Address>,
    ) -> RedisResult<Connection> {
        let connect_timeout = Duration::from_millis(self.connect_timeout_ms);
        let response_timeout = Duration::from_millis(self.response_timeout_ms);
        let mut config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(connect_timeout))
            .set_response_timeout(Some(response_timeout));
        let mut infos = self.infos()?;
        if self.mode == Mode::Cluster {
            let mut builder = ClusterClientBuilder::new(infos)
                .connection_timeout(connect_timeout)
                .response_timeout(response_timeout)
                .overall_response_timeout(Some(response_timeout))
                .tcp_settings(Self::tcp())
                .use_protocol(ProtocolVersion::RESP3);
            if let Some(certificates) = self.certificates()? {
                builder = builder.certs(certificates);
            }
            if let Some(push) = push {
                builder = builder.push_sender(push);
            }
            return Ok(Connection::Cluster(builder.build()?.get_async_connection().await?));
        }
        if let Some(push) = push {
            config = config.set_push_sender(push);
        }
        // User, password and database of the master are those of the first URL.
        let first = infos.swap_remove(0);
        let client = self.client(master.map_or_else(|| first.clone(), |master| sentinels::at(&first, master)))?;
        Ok(Connection::Single(client.get_multiplexed_async_connection_with_config(&config).await?))
    }

    /// Why [`RedisSettings::open`] failed. A server without TLS waits for the end of what it takes for a command; one with TLS
    /// hangs up on who speaks without.
    pub(super) fn refused(&self, error: &RedisError) -> String {
        let secure = self
            .infos()
            .is_ok_and(|infos| infos.iter().any(|info| matches!(info.addr(), ConnectionAddr::TcpTls { .. })));
        let hint = if secure && error.is_timeout() {
            " (does Redis speak TLS on this port?)"
        } else if !secure && error.is_connection_dropped() {
            " (does Redis want TLS, rediss://, on this port?)"
        } else {
            ""
        };
        describe(error) + hint
    }
}

/// Asks the server (in a cluster: every master) who it is. A server that is loading or no master counts as away: on a demoted
/// one every write would be refused, for ever, on a connection that looks healthy.
pub(super) async fn probe(connection: &mut Connection) -> Result<Generation, String> {
    let mut info = redis::cmd("INFO");
    info.arg("server").arg("replication").arg("persistence");
    let answers: Vec<String> = match connection {
        Connection::Single(connection) => {
            vec![info.query_async(connection).await.map_err(|error| describe(&error))?]
        }
        Connection::Cluster(connection) => {
            let routing = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None));
            let value = connection.route_command(info, routing).await.map_err(|error| describe(&error))?;
            let by_node: std::collections::HashMap<String, String> =
                redis::from_redis_value(value).map_err(|_| "INFO gave an unexpected answer".to_owned())?;
            by_node.into_values().collect()
        }
    };
    let mut lives = Vec::with_capacity(answers.len());
    for answer in &answers {
        let field = |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        if field("loading:") == "1" {
            return Err("Redis is loading its data".into());
        }
        if field("role:") != "master" {
            return Err("the Redis server is a replica".into());
        }
        lives.push(format!("{}.{}", field("run_id:"), field("master_replid:")));
    }
    lives.sort_unstable();
    Ok(Generation(Arc::from(digest(&lives))))
}

/// 16 hex digits: short, because every accept carries and stores it.
fn digest(lives: &[String]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    lives.iter().for_each(|life| hash.update(life.as_bytes()));
    crate::broadcast::request::hex(&hash.finalize()[..8])
}

/// An error as a sentence; Redis' messages hold no secrets, the URL is never part of them.
pub(super) fn describe(error: &RedisError) -> String {
    if error.is_timeout() {
        "no answer in time".into()
    } else if error.is_connection_refusal() {
        "connection refused".into()
    } else {
        let text: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
        let advice = advice(&text);
        text + advice
    }
}
