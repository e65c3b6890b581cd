//! The binary: which role, with which settings, and the exit code.

mod cli;

use std::process::ExitCode;

use broadcastd::settings::SettingsError;
use clap::Parser;

/// sysexits' EX_CONFIG: the settings are wrong, and a restart will not help.
const BAD_SETTINGS: u8 = 78;

fn main() -> ExitCode {
    // What tests want to happen inside; see `broadcastd::failpoint`.
    #[cfg(debug_assertions)]
    let _failpoints = fail::FailScenario::setup();
    // Two TLS clients (AMQP, Redis) share one provider; rustls wants it named.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("broadcastd: TLS was set up twice");
        return ExitCode::FAILURE;
    }
    let cli = cli::Cli::parse();
    let mut builder = if cli.is_single_threaded() {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("broadcastd: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(cli::run(cli));
    // A blocked helper thread must not keep a drained process alive.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("broadcastd: {error:#}");
            if error.is::<SettingsError>() { ExitCode::from(BAD_SETTINGS) } else { ExitCode::FAILURE }
        }
    }
}
