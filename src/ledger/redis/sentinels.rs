//! Which server the Sentinels call the master: asked before each connection, and again while it stands. A master that was cut off
//! from its Sentinels says of itself that it is one for as long as it lives.

use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ConnectionAddr, ConnectionInfo, RedisConnectionInfo, RedisResult};
use secrecy::ExposeSecret;

use super::connect::RedisSettings;

/// How long the Sentinels have to answer, all at once: one that is cut off must not hide what the others say.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Host and port, as the Sentinels name them.
pub(super) type Address = (String, u16);

/// What one Sentinel says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Opinion {
    master: Address,
    /// Every failover has a number of its own; the Sentinel that knows of a later one is right.
    epoch: u64,
}

/// The Sentinels, with the connections to them.
pub(super) struct Sentinels {
    service: String,
    all: Vec<(ConnectionInfo, Option<MultiplexedConnection>)>,
    settings: RedisSettings,
}

impl Sentinels {
    /// `infos`: where they are, by `redis.url`; user and password there are those of the master.
    pub(super) fn new(settings: &RedisSettings, infos: &[ConnectionInfo]) -> Self {
        let mut login = RedisConnectionInfo::default();
        if !settings.sentinel_username.is_empty() {
            login = login.set_username(&settings.sentinel_username);
        }
        let password = settings.sentinel_password.expose_secret();
        if !password.is_empty() {
            login = login.set_password(password);
        }
        let all = infos.iter().map(|info| (info.clone().set_redis_settings(login.clone()), None)).collect();
        Self { service: settings.sentinel_service.clone(), all, settings: settings.clone() }
    }

    /// The master's address, by the Sentinel that knows of the latest failover.
    ///
    /// # Errors
    /// A sentence: none of them answered, or none knows the service.
    pub(super) async fn master(&mut self) -> Result<Address, String> {
        let (service, settings) = (&self.service, &self.settings);
        let asked = self.all.iter_mut().map(async |(info, connection)| {
            let answer = tokio::time::timeout(ANSWER_WITHIN, ask(settings, info, connection, service)).await;
            if !matches!(answer, Ok(Ok(_))) {
                *connection = None;
            }
            match answer {
                Ok(answer) => answer.map_err(|error| super::connect::describe(&error)),
                Err(_) => Err("no answer in time".to_owned()),
            }
        });
        let mut reason = "there is none".to_owned();
        let mut opinions = Vec::new();
        for answer in join_all(asked).await {
            match answer {
                Ok(Some(opinion)) => opinions.push(opinion),
                Ok(None) => reason = format!("{service} is not known to it"),
                Err(error) => reason = error,
            }
        }
        latest(opinions).ok_or_else(|| format!("no Sentinel names the master: {reason}"))
    }
}

fn latest(opinions: Vec<Opinion>) -> Option<Address> {
    opinions.into_iter().max_by_key(|opinion| opinion.epoch).map(|opinion| opinion.master)
}

/// `None`: it does not know the service.
async fn ask(
    settings: &RedisSettings,
    info: &ConnectionInfo,
    connection: &mut Option<MultiplexedConnection>,
    service: &str,
) -> RedisResult<Option<Opinion>> {
    let connection = if let Some(connection) = connection {
        connection
    } else {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN));
        let client = settings.client(info.clone())?;
        connection.insert(client.get_multiplexed_async_connection_with_config(&config).await?)
    };
    // This names the promoted one as soon as it is promoted; only the other tells the epoch.
    let mut by_name = redis::cmd("SENTINEL");
    by_name.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
    let Some((host, port)) = by_name.query_async::<Option<(String, u16)>>(connection).await? else { return Ok(None) };
    let mut details = redis::cmd("SENTINEL");
    details.arg("MASTER").arg(service);
    let details: std::collections::HashMap<String, String> = details.query_async(connection).await?;
    let epoch = details.get("config-epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    Ok(Some(Opinion { master: (host, port), epoch }))
}

/// `info` with another address; TLS or not as before.
pub(super) fn at(info: &ConnectionInfo, (host, port): &Address) -> ConnectionInfo {
    let address = match info.addr() {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => ConnectionAddr::TcpTls {
            host: host.clone(),
            port: *port,
            insecure: *insecure,
            tls_params: tls_params.clone(),
        },
        _ => ConnectionAddr::Tcp(host.clone(), *port),
    };
    info.clone().set_addr(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opinion(port: u16, epoch: u64) -> Opinion {
        Opinion { master: ("10.0.0.1".to_owned(), port), epoch }
    }

    #[test]
    fn who_knows_of_the_latest_failover_is_believed_however_many_say_otherwise() {
        assert_eq!(latest(vec![opinion(1, 3), opinion(2, 4), opinion(1, 3)]).map(|(_, port)| port), Some(2));
        assert_eq!(latest(Vec::new()), None);
    }

    #[test]
    fn the_master_is_met_as_the_sentinels_are() {
        use redis::IntoConnectionInfo;
        for scheme in ["redis", "rediss"] {
            let info = format!("{scheme}://ada:secret@10.0.0.9:26379/2").into_connection_info().unwrap();
            let master = at(&info, &("10.0.0.1".to_owned(), 6379));
            let tls = matches!(master.addr(), ConnectionAddr::TcpTls { .. });
            assert_eq!((master.addr().to_string().as_str(), tls), ("10.0.0.1:6379", scheme == "rediss"));
            assert_eq!((master.redis_settings().username(), master.redis_settings().db()), (Some("ada"), 2));
        }
    }
}
