//! The command line.

use std::future::pending;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use broadcastd::app::{self, Role};
use broadcastd::command::{bench, demo, health, listen, redrive, send, token};
use broadcastd::settings::{self, Settings, SettingsError, Sources};
use broadcastd::telemetry;
use clap::{Args, Parser, Subcommand};
use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;

/// Tells every user of an app something, at once.
///
/// A backend enqueues one request (AMQP, or HTTP through `api`); a `worker` decides, stores and publishes it in one step; every
/// `node` delivers it to its devices over WebSocket; devices that log in later get what was sent for them meanwhile.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 110,
    after_help = "\
Try it:          broadcastd demo
One machine:     broadcastd --config apps.toml standalone
In production:   broadcastd --config broadcastd.toml worker   (and api, and node: as many of each as needed)
Every setting, with its default and meaning:  broadcastd config defaults"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    sources: SourceArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct SourceArgs {
    /// A TOML file with settings
    #[arg(long, global = true, value_name = "FILE", env = "BROADCASTD_CONFIG")]
    config: Option<PathBuf>,
    /// One setting, e.g. --set redis.url=redis://127.0.0.1:6379; may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE", value_parser = key_value)]
    overrides: Vec<(String, String)>,
    /// Short for --set listen.public=ADDRESS: devices, server API and console
    #[arg(long, global = true, value_name = "HOST:PORT")]
    listen: Option<SocketAddr>,
    /// Short for --set listen.admin=ADDRESS: health and metrics
    #[arg(long, global = true, value_name = "HOST:PORT")]
    admin_listen: Option<SocketAddr>,
    /// One app "demo" with the secret "demo-secret", and logins without a token; on loopback only
    #[arg(long, global = true)]
    dev: bool,
    /// Let --dev listen on other addresses too
    #[arg(long, global = true)]
    dev_anywhere: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Show what it does: a server, some devices, one broadcast, in this terminal
    Demo,
    /// Everything in one process, on one file; needs no RabbitMQ and no Redis
    Standalone,
    /// Take requests from RabbitMQ and turn them into broadcasts
    Worker,
    /// Hold devices' WebSockets and deliver to them
    Node,
    /// Serve the HTTP API for backends
    Api,
    /// Send a broadcast through the HTTP API
    Send(send::SendArgs),
    /// Be a device: print what arrives
    Listen(listen::ListenArgs),
    /// Mint a token for a device
    Token(token::TokenArgs),
    /// Open many devices against a server, send, and see how long everyone took to have it
    Bench(bench::BenchArgs),
    /// The devices of `bench`, told what to do on standard input
    #[command(hide = true)]
    Fleet,
    /// Ask a running process whether it is ready
    Health(health::HealthArgs),
    /// Try dead letters again
    Redrive(redrive::RedriveArgs),
    /// Look at the settings
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check the settings and print those in force, secrets redacted
    Check,
    /// Print the built-in defaults, which document every setting
    Defaults,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it has the form KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

impl Cli {
    /// Whether its runtime has one thread: a worker's time goes to two connections, whose tasks threads would hand to each other
    /// (the figure is in ARCHITECTURE.md). lapin has a thread of its own beside it. More workers are more processes.
    pub(crate) const fn is_single_threaded(&self) -> bool {
        matches!(self.command, Command::Worker)
    }
}

/// Does what the command line says.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Demo => role(cli.sources, Role::Demo).await,
        Command::Standalone => role(cli.sources, Role::Standalone).await,
        Command::Worker => role(cli.sources, Role::Worker).await,
        Command::Node => role(cli.sources, Role::Node).await,
        Command::Api => role(cli.sources, Role::Api).await,
        Command::Send(args) => send::run(args).await,
        Command::Listen(args) => listen::run(args).await,
        Command::Token(args) => token::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Fleet => {
            app::raise_descriptor_limit();
            tokio::task::spawn_blocking(bench::fleet::run).await.context("the fleet failed")??;
            Ok(ExitCode::SUCCESS)
        }
        Command::Health(args) => health::run(args).await,
        Command::Redrive(args) => redrive::run(args, Settings::load(&cli.sources.into_sources(None))?.amqp).await,
        Command::Config { command: ConfigCommand::Check } => {
            print!("{}", settings::effective(&cli.sources.into_sources(None))?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { command: ConfigCommand::Defaults } => {
            print!("{}", settings::DEFAULTS);
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl SourceArgs {
    fn into_sources(self, role: Option<Role>) -> Sources {
        let mut overrides = self.overrides;
        overrides.extend(self.listen.map(|address| ("listen.public".to_owned(), address.to_string())));
        overrides.extend(self.admin_listen.map(|address| ("listen.admin".to_owned(), address.to_string())));
        if role == Some(Role::Demo) && !overrides.iter().any(|(key, _)| key == "log.level") {
            // The demo speaks for itself.
            overrides.push(("log.level".to_owned(), "warn".to_owned()));
        }
        Sources { file: self.config, overrides, dev: self.dev || role == Some(Role::Demo) }
    }
}

async fn role(sources: SourceArgs, role: Role) -> anyhow::Result<ExitCode> {
    let anywhere = sources.dev_anywhere;
    let sources = sources.into_sources(Some(role));
    let settings = Settings::load(&sources)?;
    if settings.node.tokenless_login && !anywhere && !settings.listen.public.ip().is_loopback() {
        let sentence = "--dev (node.tokenless_login) lets anybody in without a token, so it only listens on loopback; \
                        --dev-anywhere forces it";
        return Err(SettingsError::new(sentence).into());
    }
    telemetry::init(&settings.log).map_err(|error| SettingsError::new(error.to_string()))?;
    app::raise_descriptor_limit();
    let demo_app = settings.directory()?.get("demo").map(|app| app.secret.expose_secret().to_owned());
    app::run(role, settings, |address| async move {
        if role != Role::Demo {
            return pending().await;
        }
        let stage = demo::Stage {
            address: address.context("the demo's server does not listen")?,
            app: "demo".to_owned(),
            secret: demo_app.context("the demo's app is missing")?.into(),
        };
        demo::run(stage, CancellationToken::new()).await
    })
    .await?;
    Ok(ExitCode::SUCCESS)
}
