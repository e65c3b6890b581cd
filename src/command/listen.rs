//! `broadcastd listen`: a device in the terminal.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use super::device::{Broadcast, Device, Happening, Login};
use super::{SecretArgs, print_line, printable, token};
use crate::broadcast::platform::Platform;

/// Be a device in the terminal: one line for each broadcast that arrives
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A line is the time (UTC), the id, the sender's account and the text. What happens to the connection goes to stderr.
It reconnects by itself from the last id that it has had; --since starts it after a known id.

Examples:
  # Everything that is still kept, then live, on a server started with --dev
  broadcastd listen

  # The next three broadcasts as JSON, as an Android phone of account ada
  broadcastd listen --account ada --platform aos --count 3 --json

  # A token is minted from the app's secret
  broadcastd listen --url wss://im.example.org/ws --app shop --secret-file shop.secret --account ada")]
pub struct ListenArgs {
    /// The server's WebSocket address
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    pub url: String,
    /// The app's key
    #[arg(long, default_value = super::DEV_APP)]
    pub app: String,
    /// The account
    #[arg(long, default_value = "terminal")]
    pub account: String,
    /// Names this device (a new name if not given)
    #[arg(long)]
    pub device: Option<String>,
    /// The device's platform: ios, aos, pc, web or mac
    #[arg(long, default_value = "pc", value_parser = platform)]
    pub platform: Platform,
    /// The device's token
    #[arg(long, value_name = "JWT", conflicts_with_all = ["secret", "secret_file"])]
    pub token: Option<String>,
    #[command(flatten)]
    secret: SecretArgs,
    /// The last id that this device has had: only later ones come
    #[arg(long, value_name = "ID", default_value_t = 0)]
    pub since: u64,
    /// Exit after so many broadcasts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Print each arrival as a line of JSON
    #[arg(long)]
    pub json: bool,
}

fn platform(name: &str) -> Result<Platform, &'static str> {
    Platform::parse(name).ok_or("a platform is ios, aos, pc, web or mac")
}

/// Listens until `--count` broadcasts have come, stdout is closed, or the process is ended.
///
/// # Errors
/// If the server refuses the device, with its sentence; if the secret cannot be read.
pub async fn run(args: ListenArgs) -> anyhow::Result<ExitCode> {
    let token = match (args.token, args.secret.read()?) {
        (Some(token), _) => Some(token),
        // Minted once: longer than a terminal is looked at.
        (None, Some(secret)) => Some(token::mint(&args.app, &secret, &args.account, Duration::from_secs(7 * 86_400))?),
        (None, None) => None,
    };
    let mut device = Device::new(Login {
        url: args.url,
        app: args.app,
        account: args.account,
        device: args.device.unwrap_or_else(|| format!("terminal-{}", Uuid::new_v4().simple())),
        platform: args.platform.name().to_owned(),
        token,
        since: args.since,
    });
    let mut left = args.count;
    loop {
        let line = match device.next().await? {
            Happening::Welcome(_) => {
                eprintln!("logged in");
                continue;
            }
            Happening::Away(why, pause) => {
                eprintln!("{}; trying again in {:.1} s", printable(&why), pause.as_secs_f64());
                continue;
            }
            Happening::Recall(id) if args.json => json!({ "type": "recall", "id": id }).to_string(),
            Happening::Recall(id) => format!("         {id} was recalled"),
            Happening::Broadcast(broadcast) => {
                left = left.map(|left| left.saturating_sub(1));
                if args.json { json(&broadcast) } else { line(&broadcast) }
            }
        };
        if !print_line(&line)? || left == Some(0) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn json(broadcast: &Broadcast) -> String {
    json!({
        "type": "broadcast",
        "id": broadcast.id,
        "fromAccount": broadcast.from_account,
        "time": broadcast.time,
        "content": broadcast.content,
    })
    .to_string()
}

fn line(broadcast: &Broadcast) -> String {
    let from = if broadcast.from_account.is_empty() { "-" } else { &broadcast.from_account };
    format!("{} {} {} {}", clock(broadcast.time), broadcast.id, printable(from), printable(&broadcast.content))
}

/// `HH:MM:SS` in UTC.
fn clock(time_ms: u64) -> String {
    let second = time_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_an_arrival_whatever_it_says() {
        let broadcast = Broadcast { id: 7, from_account: String::new(), time: 45_296_000, content: "a\nb".to_owned() };
        assert_eq!(line(&broadcast), "12:34:56 7 - a b");
        assert_eq!(json(&broadcast).lines().count(), 1);
    }
}
