//! Logs, to stderr: one line an event, readable in a terminal, JSON for machines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Section `[log]`.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogSettings {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`), or directives such as `info,broadcastd::node=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text if stderr is a terminal, else JSON.
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Why logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is not a filter.
    #[error("log.level is not a level or a list of directives: {0}")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    /// It names a library that prints passwords and bodies.
    #[error("log.level names {0}: what that library logs holds passwords and bodies, and is left out at any level")]
    Loud(String),
    /// Logging was started before.
    #[error("logging is started already: {0}")]
    Started(#[from] tracing_subscriber::util::TryInitError),
}

/// Starts logging; once a process.
///
/// # Errors
/// [`TelemetryError`].
pub fn init(settings: &LogSettings) -> Result<(), TelemetryError> {
    use tracing_subscriber::util::SubscriberInitExt;
    let terminal = std::io::stderr().is_terminal();
    let json = match settings.format {
        LogFormat::Auto => !terminal,
        LogFormat::Json => true,
        LogFormat::Text => false,
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(&settings.level)?)
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    if json {
        builder.json().flatten_event(true).with_current_span(false).with_span_list(false).finish().try_init()?;
    } else {
        builder.finish().try_init()?;
    }
    Ok(())
}

/// Libraries that print what they carry: lapin warns of each returned message with its body, and below that prints every frame,
/// the login's password among them; the others print addresses, headers and messages. Nobody can ask for that.
const QUIET: [&str; 9] = [
    "lapin=error",
    "amq_protocol=error",
    "amq_protocol_tcp=error",
    "async_rs=error",
    "redis=warn",
    "hyper=info",
    "ureq=info",
    "ureq_proto=info",
    "tungstenite=info",
];

/// Whether a directive is for a module inside one of [`QUIET`], and would outdo that.
fn is_loud(directive: &str) -> bool {
    let target = directive.split(['=', '[']).next().unwrap_or_default().trim();
    QUIET.iter().filter_map(|quiet| quiet.split('=').next()).any(|quiet| target.split("::").next() == Some(quiet))
}

fn filter(level: &str) -> Result<EnvFilter, TelemetryError> {
    if let Some(loud) = level.split(',').find(|directive| is_loud(directive)) {
        return Err(TelemetryError::Loud(loud.to_owned()));
    }
    let mut filter = EnvFilter::try_new(level)?;
    for directive in QUIET {
        filter = filter.add_directive(directive.parse()?);
    }
    Ok(filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked_and_lapin_is_kept_quiet() {
        assert!(filter("broadcastd=nonsense").is_err());
        assert!(filter("info").unwrap().to_string().contains("lapin=error"));
        assert!(filter("trace").unwrap().to_string().contains("amq_protocol_tcp=error"));
        for loud in ["info,lapin=trace", "lapin::io_loop=trace", "debug, hyper", "redis[x]=trace"] {
            assert!(filter(loud).unwrap_err().to_string().contains("passwords"), "{loud}");
        }
        assert!(filter("info,broadcastd::ledger::redis=trace").is_ok());
    }
}
