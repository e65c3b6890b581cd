//! How a connection to RabbitMQ is made, and how publishes on it are confirmed; shared by the worker and the API.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::tcp::{AMQPUriTcpExt, RustlsConnector, RustlsConnectorConfig, TLSConfig};
use lapin::types::ShortString;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, PublisherConfirm};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::tls::{TlsFiles, advice};

/// Section `[amqp]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpSettings {
    /// `amqp://user:password@host:port/vhost`, `amqps://` for TLS.
    pub url: SecretString,
    /// A file that holds the URL, instead; read by the settings loader.
    pub url_file: String,
    /// A PEM file with the certificate authority to trust for TLS, instead of the system's.
    pub ca_file: String,
    /// A PEM file with the certificate that this client shows to the broker, where that wants one.
    #[serde(default)]
    pub client_certificate_file: String,
    /// A PEM file with its private key.
    #[serde(default)]
    pub client_key_file: String,
    /// The direct exchange that requests are published to.
    pub exchange: String,
    /// The routing key of requests.
    pub routing_key: String,
    /// The quorum queue that the workers consume.
    pub queue: String,
    /// The most requests that may wait in the queue; beyond it the broker refuses to take more (a publisher with confirms
    /// sees a nack).
    pub queue_max_length: u32,
    /// The dead-letter exchange, its queue and its routing key.
    pub dead_letter: String,
    /// The most dead letters that are kept; the oldest go first.
    pub dead_letter_max_length: u32,
    /// How often a request may be delivered before the broker dead-letters it.
    pub delivery_limit: u32,
    /// Whether the worker declares the exchanges and queues; if not, they must exist.
    pub declare: bool,
    /// The most requests that a worker holds at once; they are its memory bound too.
    pub prefetch: u16,
    /// A peer that is silent for two of these is gone, in seconds.
    pub heartbeat_seconds: u16,
    /// Time to connect, milliseconds.
    pub connect_timeout_ms: u64,
}

impl AmqpSettings {
    fn uri(&self) -> Result<AMQPUri, String> {
        // The parser's own message quotes the URL, password included.
        let mut uri: AMQPUri =
            self.url.expose_secret().trim().parse().map_err(|_| "amqp.url is not an AMQP URL".to_owned())?;
        uri.query.heartbeat.get_or_insert(self.heartbeat_seconds);
        uri.query.connection_timeout.get_or_insert(self.connect_timeout_ms);
        Ok(uri)
    }

    fn tls_files(&self) -> TlsFiles<'_> {
        let (certificate, key) = (&self.client_certificate_file, &self.client_key_file);
        TlsFiles { section: "amqp", ca: &self.ca_file, certificate, key }
    }

    /// Not lapin's own: that one would trust the system's authorities beside those of the file, and need some to be there.
    fn tls(&self) -> Result<RustlsConnector, String> {
        let unusable = |error: &dyn std::fmt::Display| format!("amqp: TLS cannot be set up: {error}");
        let pem = self.tls_files().read()?;
        let parse = |pem: &[u8]| {
            CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| unusable(&error))
        };
        let mut config = match &pem.ca {
            None => RustlsConnectorConfig::new_with_native_certs().map_err(|error| unusable(&error))?,
            Some(_) => RustlsConnectorConfig::default(),
        };
        if let Some(ca) = &pem.ca {
            config.add_parsable_certificates(parse(ca)?);
        }
        let connector = match &pem.identity {
            None => config.connector_with_no_client_auth(),
            Some((chain, key)) => {
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| unusable(&error))?;
                config.connector_with_single_cert(parse(chain)?, key)
            }
        };
        connector.map_err(|error| unusable(&error))
    }

    /// Checks what can be checked without connecting.
    ///
    /// # Errors
    /// A sentence, without the URL.
    pub fn validate(&self) -> Result<(), String> {
        let uri = self.uri()?;
        if self.tls_files().any() && uri.scheme != AMQPScheme::AMQPS {
            return Err("amqp.ca_file or a client certificate is set, but amqp.url is no amqps:// address".into());
        }
        self.tls_files().read()?;
        if self.prefetch == 0 || self.prefetch > 2000 {
            return Err("amqp.prefetch is from 1 to 2000 (the cap of a quorum queue)".into());
        }
        if !(1..=600_000).contains(&self.connect_timeout_ms) {
            return Err("amqp.connect_timeout_ms is from 1 to 600000".into());
        }
        if self.heartbeat_seconds == 0 {
            return Err("amqp.heartbeat_seconds is at least 1: without it a dead broker is never noticed".into());
        }
        // The address wins over the setting.
        if uri.query.heartbeat == Some(0) {
            return Err("amqp.url says heartbeat=0: without it a dead broker is never noticed".into());
        }
        if self.delivery_limit == 0 || self.queue_max_length == 0 || self.dead_letter_max_length == 0 {
            return Err("amqp.delivery_limit and the max_lengths are at least 1".into());
        }
        Ok(())
    }
}

/// Connects; `name` is shown in the broker's list of connections. lapin's own recovery stays off: a session is rebuilt as a
/// whole, so that no acknowledgement ever meets a channel it does not belong to.
///
/// # Errors
/// A sentence, without the URL.
pub async fn connect(settings: &AmqpSettings, name: &str) -> Result<Connection, String> {
    let uri = settings.uri()?;
    let tls = if uri.scheme == AMQPScheme::AMQPS { Some(settings.tls()?) } else { None };
    let secure = tls.is_some();
    let runtime = lapin::runtime::default_runtime().map_err(|error| describe(&error))?;
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let open = async move |mut uri: AMQPUri, runtime| {
        // The plain connection first; TLS is put on it here.
        uri.scheme = AMQPScheme::AMQP;
        let stream = uri.connect_with_config_async(TLSConfig::default(), &runtime).await?;
        match &tls {
            None => Ok(stream),
            Some(tls) => Ok(stream.into_rustls(tls, &uri.authority.host).await?),
        }
    };
    let connecting = Connection::connector(uri, runtime, open, properties);
    // lapin bounds the TCP connect only: a broker that is booting, or frozen, accepts and then says nothing.
    tokio::time::timeout(Duration::from_millis(settings.connect_timeout_ms), connecting)
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|error| refused(&error, secure))
}

/// Why there is no connection. A broker that expects TLS hangs up on who speaks without.
fn refused(error: &lapin::Error, secure: bool) -> String {
    let text = describe(error);
    let hung_up = matches!(error.kind(), lapin::ErrorKind::IOError(_)) && !secure && !text.contains("refused");
    let advice = if hung_up { " (does the broker want TLS, amqps://, on this port?)" } else { advice(&text) };
    text + advice
}

/// An error as a sentence for logs and `/readyz`: no control characters, at most 200 characters.
#[must_use]
pub fn describe(error: &lapin::Error) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(200).collect()
}

/// More publishes than this that the broker has neither confirmed nor refused, and nobody waits for any more: the channel is not
/// used any longer.
const MOST_ABANDONED: usize = 1000;

/// A channel on which every publish is confirmed.
pub struct Publisher {
    channel: Channel,
    abandoned: Arc<AtomicUsize>,
}

impl Publisher {
    /// A new channel.
    ///
    /// # Errors
    /// The broker's.
    pub async fn open(connection: &Connection) -> lapin::Result<Self> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { channel, abandoned: Arc::default() })
    }

    /// Publishes; when it returns, the message is on its way.
    ///
    /// # Errors
    /// The channel is gone.
    pub async fn publish(
        &self,
        exchange: ShortString,
        routing_key: ShortString,
        options: BasicPublishOptions,
        payload: &[u8],
        properties: BasicProperties,
    ) -> lapin::Result<Confirm> {
        let confirm = self.channel.basic_publish(exchange, routing_key, options, payload, properties).await?;
        Ok(Confirm { confirm: Some(confirm), abandoned: Some(Arc::clone(&self.abandoned)) })
    }

    /// Whether the channel lives, and not too much on it has been given up.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.channel.status().connected() && self.abandoned.load(Ordering::Relaxed) <= MOST_ABANDONED
    }
}

/// A confirm that is waited for even if nobody does any more: lapin keeps each one that is dropped unresolved in a list that
/// only grows. It resolves with the broker's answer or with the channel's end.
pub struct Confirm {
    confirm: Option<PublisherConfirm>,
    /// Counts those that are dropped unresolved, until they are.
    abandoned: Option<Arc<AtomicUsize>>,
}

impl From<PublisherConfirm> for Confirm {
    fn from(confirm: PublisherConfirm) -> Self {
        Self { confirm: Some(confirm), abandoned: None }
    }
}

impl Future for Confirm {
    type Output = lapin::Result<Confirmation>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(confirm) = &mut self.confirm else { return Poll::Pending };
        let result = std::task::ready!(Pin::new(confirm).poll(context));
        self.confirm = None;
        Poll::Ready(result)
    }
}

impl Drop for Confirm {
    fn drop(&mut self) {
        let (Some(confirm), Ok(runtime)) = (self.confirm.take(), tokio::runtime::Handle::try_current()) else { return };
        let abandoned = self.abandoned.take();
        if let Some(abandoned) = &abandoned {
            abandoned.fetch_add(1, Ordering::Relaxed);
        }
        runtime.spawn(async move {
            let _ = confirm.await;
            if let Some(abandoned) = abandoned {
                abandoned.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> AmqpSettings {
        let settings = serde_json::json!({
            "url": url, "url_file": "", "ca_file": "", "exchange": "e", "routing_key": "r", "queue": "q",
            "queue_max_length": 1, "dead_letter": "d", "dead_letter_max_length": 1, "delivery_limit": 1, "declare": true,
            "prefetch": 1, "heartbeat_seconds": 10, "connect_timeout_ms": 1000,
        });
        serde_json::from_value(settings).unwrap()
    }

    #[test]
    fn heartbeats_cannot_be_turned_off_in_the_address_either() {
        assert_eq!(settings("amqp://host?heartbeat=5").validate(), Ok(()));
        let refused = settings("amqp://user:secret@host?heartbeat=0").validate().unwrap_err();
        assert!(refused.contains("heartbeat=0") && !refused.contains("secret"), "{refused}");
        let off = AmqpSettings { heartbeat_seconds: 0, ..settings("amqp://host") };
        assert!(off.validate().unwrap_err().contains("amqp.heartbeat_seconds"));
    }
}
