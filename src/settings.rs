//! The settings: built-in defaults < file < environment < flags. Unknown keys are errors.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Environment, File, FileFormat, Value, ValueKind};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::amqp::AmqpSettings;
use crate::api::ApiSettings;
use crate::broadcast::app::{App, AppKey, Directory};
use crate::broadcast::quota::Limits;
use crate::ledger::LedgerSettings;
use crate::ledger::embedded::EmbeddedSettings;
use crate::ledger::redis::RedisSettings;
use crate::node::NodeSettings;
use crate::telemetry::LogSettings;
use crate::worker::WorkerSettings;

/// The built-in defaults, which document every key.
pub const DEFAULTS: &str = include_str!("default.toml");

/// Where the settings come from, besides the defaults and the environment.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// `--set key=value`, and the flags that are short for one.
    pub overrides: Vec<(String, String)>,
    /// `--dev`: one app "demo" with the secret "demo-secret", and logins without a token.
    pub dev: bool,
}

/// Settings that cannot be used; the sentence says which and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

impl SettingsError {
    /// `sentence`: which setting, and what to do.
    #[must_use]
    pub fn new(sentence: impl Into<String>) -> Self {
        Self(sentence.into())
    }
}

/// Everything. Only the composition root sees it whole.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where to listen.
    pub listen: ListenSettings,
    /// Logs.
    pub log: LogSettings,
    /// RabbitMQ.
    pub amqp: AmqpSettings,
    /// Redis.
    pub redis: RedisSettings,
    /// History.
    pub ledger: LedgerSettings,
    /// The worker.
    pub worker: WorkerSettings,
    /// The server API.
    pub api: ApiSettings,
    /// The node.
    pub node: NodeSettings,
    /// Stopping.
    pub drain: DrainSettings,
    /// The embedded store.
    pub embedded: EmbeddedSettings,
    apps_file: String,
    apps: Vec<AppSettings>,
}

/// Section `[listen]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenSettings {
    /// Devices, server API, console.
    pub public: SocketAddr,
    /// Health and metrics.
    pub admin: SocketAddr,
}

/// Section `[drain]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainSettings {
    /// From the signal to the end of intake, seconds.
    pub notice_seconds: u64,
    /// From there to the exit, seconds.
    pub deadline_seconds: u64,
    /// Devices that a node sends away in a second, if the deadline allows.
    pub leaves_per_second: u32,
}

/// One `[[apps]]` table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct AppSettings {
    key: String,
    secret: Option<SecretString>,
    secret_file: Option<PathBuf>,
    #[serde(default = "on")]
    broadcast: bool,
    per_minute: Option<u32>,
    per_day: Option<u32>,
}

const fn on() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AppsFile {
    apps: Vec<AppSettings>,
}

impl Settings {
    /// Loads and checks everything. Opens nothing but files.
    ///
    /// # Errors
    /// One sentence.
    pub fn load(sources: &Sources) -> Result<Self, SettingsError> {
        let mut settings: Self = merged(sources)?.try_deserialize().map_err(explain)?;
        if !settings.amqp.url_file.is_empty() {
            settings.amqp.url = secret_from("amqp.url_file", Path::new(&settings.amqp.url_file))?;
        }
        if !settings.redis.url_file.is_empty() {
            settings.redis.url = secret_from("redis.url_file", Path::new(&settings.redis.url_file))?;
        }
        let redis = &mut settings.redis;
        if !redis.sentinel_password_file.is_empty() {
            let file = Path::new(&redis.sentinel_password_file);
            redis.sentinel_password = secret_from("redis.sentinel_password_file", file)?;
        }
        if !settings.apps_file.is_empty() {
            let file = File::new(&settings.apps_file, FileFormat::Toml);
            let more: AppsFile =
                Config::builder().add_source(file).build().and_then(Config::try_deserialize).map_err(explain)?;
            settings.apps.extend(more.apps);
        }
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<(), SettingsError> {
        self.amqp.validate().map_err(SettingsError)?;
        self.redis.validate().map_err(SettingsError)?;
        self.worker.validate().map_err(SettingsError)?;
        self.node.validate().map_err(SettingsError)?;
        self.api.validate().map_err(SettingsError)?;
        if !(1..=100_000).contains(&self.ledger.log_length) || !(1..=8760).contains(&self.ledger.log_hours) {
            return Err(SettingsError("ledger.log_length is from 1 to 100000, ledger.log_hours from 1 to 8760".into()));
        }
        if self.drain.notice_seconds > 3600 || self.drain.deadline_seconds > 3600 {
            return Err(SettingsError("drain.notice_seconds and drain.deadline_seconds are at most 3600".into()));
        }
        if self.drain.leaves_per_second == 0 {
            return Err(SettingsError("drain.leaves_per_second is at least 1".into()));
        }
        self.directory().map(|_| ())
    }

    /// The apps.
    ///
    /// # Errors
    /// A key that is malformed or occurs twice, or a secret that is missing or cannot be read.
    pub fn directory(&self) -> Result<Directory, SettingsError> {
        let apps = self.apps.iter().map(|app| {
            let key = AppKey::parse(&app.key)
                .map_err(|reason| SettingsError(format!("apps: the key {:?} is not usable: {reason}", app.key)))?;
            let secret = match (&app.secret, &app.secret_file) {
                (Some(secret), None) => secret.clone(),
                (None, Some(file)) => secret_from(&format!("apps: secret_file of {key}"), file)?,
                _ => return Err(SettingsError(format!("apps: {key} needs either secret or secret_file"))),
            };
            if secret.expose_secret().is_empty() {
                return Err(SettingsError(format!("apps: the secret of {key} is empty")));
            }
            let default = Limits::default();
            let limits = Limits {
                per_minute: app.per_minute.unwrap_or(default.per_minute),
                per_day: app.per_day.unwrap_or(default.per_day),
            };
            Ok(App { key, secret, broadcast: app.broadcast, limits })
        });
        let apps = apps.collect::<Result<Vec<_>, _>>()?;
        Directory::new(apps).map_err(|key| SettingsError(format!("apps: {key} is listed twice")))
    }
}

fn merged(sources: &Sources) -> Result<Config, SettingsError> {
    // The separator of the prefix too: it is "_" otherwise, and any BROADCASTD_… variable would be taken.
    let environment = Environment::with_prefix("BROADCASTD").prefix_separator("__").separator("__");
    let mut builder = Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
    if let Some(path) = &sources.file {
        builder = builder.add_source(File::new(&path.to_string_lossy(), FileFormat::Toml));
    }
    builder = builder.add_source(environment);
    for (key, value) in &sources.overrides {
        builder = builder.set_override(key, value.as_str()).map_err(explain)?;
    }
    if sources.dev {
        builder = builder.set_override("node.tokenless_login", true).map_err(explain)?;
    }
    let config = builder.build().map_err(explain)?;
    if !sources.dev {
        return Ok(config);
    }
    let demo = Value::from(config::Map::from([
        ("key".to_owned(), Value::from("demo")),
        ("secret".to_owned(), Value::from("demo-secret")),
    ]));
    let mut apps = config.get_array("apps").unwrap_or_default();
    apps.push(demo);
    Config::builder().add_source(config).set_override("apps", apps).and_then(|builder| builder.build()).map_err(explain)
}

fn secret_from(what: &str, path: &Path) -> Result<SecretString, SettingsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| SettingsError(format!("{what}: {} cannot be read: {error}", path.display())))?;
    Ok(text.trim_end_matches(['\r', '\n']).into())
}

/// The library's message, as one line, without any value: what stands in the wrong place may be a secret.
fn explain(error: ConfigError) -> SettingsError {
    let text = without_values(&error);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    SettingsError(format!("settings: {text}"))
}

fn without_values(error: &ConfigError) -> String {
    let place = |key: &Option<String>, origin: &Option<String>| {
        let key = key.as_ref().map(|key| format!(" for key `{key}`")).unwrap_or_default();
        let origin = origin.as_ref().map(|origin| format!(" in {origin}")).unwrap_or_default();
        key + &origin
    };
    match error {
        ConfigError::Type { origin, unexpected, expected, key } => {
            let text = unexpected.to_string();
            let kind = text.split(['"', '`']).next().unwrap_or_default().trim();
            format!("invalid type: {kind}, expected {expected}{}", place(key, origin))
        }
        ConfigError::At { error, origin, key } => without_values(error) + &place(key, origin),
        ConfigError::Message(text) => match (text.split_once(" does not have variant "), text.find('"')) {
            (Some((what, _)), _) => format!("none of the values of {what}"),
            (None, Some(start)) => format!("{}…{}", &text[..start], &text[text.rfind('"').unwrap_or(start) + 1..]),
            (None, None) => text.clone(),
        },
        // The line of the file that it quotes stands behind a bar.
        error => error.to_string().lines().filter(|line| !line.contains('|')).collect::<Vec<_>>().join(" "),
    }
}

/// The settings in force, as TOML, secrets redacted.
///
/// # Errors
/// If they cannot be loaded.
pub fn effective(sources: &Sources) -> Result<String, SettingsError> {
    Settings::load(sources)?;
    let defaults = Config::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml)).build().map_err(explain)?;
    let root = merged(sources)?.cache.into_table().map_err(explain)?;
    let mut sections: Vec<_> = root.into_iter().collect();
    sections.sort_by(|a, b| a.0.cmp(&b.0));
    let mut top = String::new();
    let mut rest = String::new();
    for (name, value) in sections {
        match value.kind {
            ValueKind::Table(table) => {
                rest.push_str(&format!("\n[{name}]\n"));
                let mut entries: Vec<_> = table.into_iter().collect();
                entries.sort_by(|a, b| a.0.cmp(&b.0));
                for (key, value) in entries {
                    rest.push_str(&line(&key, value, defaults.get::<Value>(&format!("{name}.{key}")).ok()));
                }
            }
            ValueKind::Array(tables) => {
                for table in tables {
                    rest.push_str(&format!("\n[[{name}]]\n"));
                    let mut entries: Vec<_> = table.into_table().map_err(explain)?.into_iter().collect();
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                    for (key, value) in entries {
                        rest.push_str(&line(&key, value, None));
                    }
                }
            }
            _ => top.push_str(&line(&name, value, None)),
        }
    }
    Ok(top + &rest)
}

/// `key = value`, in the type of the default: the environment only knows strings.
fn line(key: &str, value: Value, default: Option<Value>) -> String {
    let text = match (&value.kind, default.map(|default| default.kind)) {
        (_, _) if key == "secret" => "\"[redacted]\"".to_owned(),
        (ValueKind::String(text), _) if key.ends_with("password") && text.is_empty() => "\"\"".to_owned(),
        // A number too, where the quotes were forgotten.
        (_, _) if key.ends_with("password") => "\"[redacted]\"".to_owned(),
        (ValueKind::String(url), _) if key == "url" => format!("{:?}", redact(url)),
        (ValueKind::String(text), Some(ValueKind::I64(_) | ValueKind::Boolean(_))) => text.clone(),
        (ValueKind::String(text), _) => format!("{text:?}"),
        (ValueKind::Array(items), _) => {
            let items: Vec<String> = items.iter().map(|item| format!("{:?}", item.to_string())).collect();
            format!("[{}]", items.join(", "))
        }
        _ => value.to_string(),
    };
    format!("{key} = {text}\n")
}

/// URLs without what stands before the `@`, and without a query: `unix:///run/redis.sock?user=…&pass=…` is one too. A comma
/// separates URLs only where there are several: it may be in a password.
fn redact(urls: &str) -> String {
    let one = |url: &str| {
        let Some((scheme, rest)) = url.split_once("://") else { return "[redacted]".to_owned() };
        let (place, query) = match rest.find(['?', '#']) {
            // Which of the two ends the password cannot be told.
            Some(at) if rest[at..].contains('@') => return format!("{scheme}://[redacted]"),
            Some(at) => (&rest[..at], &rest[at..=at]),
            None => (rest, ""),
        };
        let place = place.rsplit_once('@').map_or(place.to_owned(), |(_, host)| format!("[redacted]@{host}"));
        let query = if query.is_empty() { String::new() } else { format!("{query}[redacted]") };
        format!("{scheme}://{place}{query}")
    };
    if urls.matches("://").count() < 2 { one(urls) } else { urls.split(',').map(one).collect::<Vec<_>>().join(",") }
}

#[cfg(test)]
mod tests;
