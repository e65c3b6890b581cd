//! The broker's section of the settings, and how a connection to it is made. A leaf.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

/// Section `[amqp]`.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AmqpSettings {
    /// `amqp://` or `amqps://` address, with user, password and vhost.
    pub url: SecretString,
    /// A file that holds the address instead.
    pub url_file: Option<PathBuf>,
    /// The exchange that requests are published to.
    pub exchange: String,
    /// The queue of requests.
    pub queue: String,
    /// The routing key of requests.
    pub routing_key: String,
    /// The dead-letter exchange and queue.
    pub dead_letter: String,
    /// Deliveries that a worker holds at most.
    pub prefetch: u16,
    /// Deliveries of one request before it is dead-lettered.
    pub delivery_limit: u32,
    /// Dead letters kept.
    pub dead_letter_max_length: u32,
    /// Heartbeat, in seconds.
    pub heartbeat_seconds: u16,
    /// A file with further certificate authorities, in PEM.
    pub ca_file: Option<PathBuf>,
}

/// Connects.
///
/// # Errors
/// What lapin says.
pub async fn connect(settings: &AmqpSettings, name: &str) -> Result<lapin::Connection, lapin::Error> {
    let properties = lapin::ConnectionProperties::default().with_connection_name(name.into());
    lapin::Connection::connect(settings.url.expose_secret(), properties).await
}
