//! How a connection to RabbitMQ is made; shared by the worker and the API.

use std::time::Duration;

use lapin::tcp::OwnedTLSConfig;
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

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

    /// Checks what can be checked without connecting.
    ///
    /// # Errors
    /// A sentence, without the URL.
    pub fn validate(&self) -> Result<(), String> {
        self.uri()?;
        if self.prefetch == 0 || self.prefetch > 2000 {
            return Err("amqp.prefetch is from 1 to 2000 (the cap of a quorum queue)".into());
        }
        if !(1..=600_000).contains(&self.connect_timeout_ms) {
            return Err("amqp.connect_timeout_ms is from 1 to 600000".into());
        }
        if self.heartbeat_seconds == 0 {
            return Err("amqp.heartbeat_seconds is at least 1: without it a dead broker is never noticed".into());
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
    let tls = if settings.ca_file.is_empty() {
        OwnedTLSConfig::default()
    } else {
        let cert_chain = tokio::fs::read_to_string(&settings.ca_file)
            .await
            .map_err(|error| format!("amqp.ca_file cannot be read: {error}"))?;
        OwnedTLSConfig { identity: None, cert_chain: Some(cert_chain) }
    };
    let runtime = lapin::runtime::default_runtime().map_err(|error| describe(&error))?;
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let connecting = Connection::connect_uri_with_config(settings.uri()?, properties, tls, runtime);
    // lapin bounds the TCP connect only: a broker that is booting, or frozen, accepts and then says nothing.
    tokio::time::timeout(Duration::from_millis(settings.connect_timeout_ms), connecting)
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|error| describe(&error))
}

/// An error as a sentence for logs and `/readyz`: no control characters, at most 200 characters.
#[must_use]
pub fn describe(error: &lapin::Error) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(200).collect()
}
