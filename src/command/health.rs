//! `broadcastd health`: for a container's health check.

use std::process::ExitCode;

use anyhow::Context;

use super::{call, exit, print_line, printable};

/// Ask a running server whether it is ready
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints what /readyz says; the exit code is 0 if the server is ready, else 1.

Example:
  broadcastd health --admin 127.0.0.1:8081")]
pub struct HealthArgs {
    /// The server's admin address
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8081")]
    pub admin: String,
}

/// Asks, and prints the answer.
///
/// # Errors
/// If the server cannot be reached.
pub async fn run(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let url = format!("http://{}/readyz", args.admin);
    let (ready, text) = tokio::task::spawn_blocking(move || {
        let mut response = call::agent().get(&url).call().with_context(|| format!("{url} cannot be reached"))?;
        let text = response.body_mut().read_to_string().with_context(|| format!("{url} broke off"))?;
        anyhow::Ok((response.status() == 200, text))
    })
    .await
    .context("the call failed")??;
    print_line(printable(&text).trim_end())?;
    Ok(exit(ready))
}
