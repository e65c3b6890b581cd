//! `broadcastd send`: one broadcast by the server API.

use std::process::ExitCode;

use anyhow::Context;
use uuid::Uuid;

use super::call::Caller;
use super::{SecretArgs, exit, print_line};
use crate::api::nim::Call;

/// Send a broadcast to every device of an app
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The answer is printed as JSON; the exit code is 0 if its code is 200, else 1.
If the answer is 500 (unknown), repeat the command with the requestId it names: the broadcast is sent once.

Examples:
  # To the devices that are online now, on a server started with --dev
  broadcastd send --body 'Back in five minutes'

  # Kept for two hours for devices that log in later, phones only
  broadcastd send --body 'Maintenance at noon' --offline --ttl-hours 2 --target-os ios,aos

  # Of another app, of another server; safe to repeat
  broadcastd send --url https://im.example.org --app shop --secret-file shop.secret --request-id sale-1 --body 'Sale!'")]
pub struct SendArgs {
    /// The server's base address
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The app's key
    #[arg(long, default_value = super::DEV_APP)]
    pub app: String,
    #[command(flatten)]
    secret: SecretArgs,
    /// What is said: 1 to 4096 characters
    #[arg(long, value_name = "TEXT")]
    pub body: String,
    /// The sender's account, at most 32 characters
    #[arg(long, value_name = "ACCOUNT")]
    pub from: Option<String>,
    /// Keep it for devices that log in later
    #[arg(long)]
    pub offline: bool,
    /// How long it is kept, in hours (7 days if not given)
    #[arg(long, value_name = "HOURS", requires = "offline")]
    pub ttl_hours: Option<u32>,
    /// The platforms it is for, of ios, aos, pc, web, mac (all if not given)
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub target_os: Vec<String>,
    /// Its id: the same id again sends nothing twice (a new one if not given)
    #[arg(long, value_name = "ID")]
    pub request_id: Option<String>,
}

/// Sends, and prints the answer.
///
/// # Errors
/// If the secret is missing or the server cannot be reached.
pub async fn run(args: SendArgs) -> anyhow::Result<ExitCode> {
    let secret = args.secret.require(&args.app)?;
    let request_id = args.request_id.clone().unwrap_or_else(|| Uuid::now_v7().to_string());
    let parameters = parameters(&args, &request_id);
    let caller = Caller { url: args.url, app: args.app, secret };
    let answer = caller.call(Call::Broadcast.path(), parameters).await.with_context(|| {
        format!("whether it was sent is unknown; it is safe to repeat with --request-id {request_id}")
    })?;
    print_line(&serde_json::to_string_pretty(&answer)?)?;
    Ok(exit(answer["code"] == 200))
}

fn parameters(args: &SendArgs, request_id: &str) -> Vec<(&'static str, String)> {
    let mut parameters = vec![("body", args.body.clone()), ("requestId", request_id.to_owned())];
    if let Some(from) = &args.from {
        parameters.push(("from", from.clone()));
    }
    if args.offline {
        parameters.push(("isOffline", "true".to_owned()));
    }
    if let Some(hours) = args.ttl_hours {
        parameters.push(("ttl", hours.to_string()));
    }
    if !args.target_os.is_empty() {
        parameters.push(("targetOs", serde_json::json!(args.target_os).to_string()));
    }
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        send: SendArgs,
    }

    #[test]
    fn flags_become_the_calls_parameters() {
        let args = ["send", "--body", "hi", "--offline", "--ttl-hours", "2", "--target-os", "ios,web", "--from", "ops"];
        let args = Command::try_parse_from(args).unwrap().send;
        let expected = [
            ("body", "hi"),
            ("requestId", "r-1"),
            ("from", "ops"),
            ("isOffline", "true"),
            ("ttl", "2"),
            ("targetOs", r#"["ios","web"]"#),
        ];
        assert_eq!(parameters(&args, "r-1"), expected.map(|(name, value)| (name, value.to_owned())));
        assert!(Command::try_parse_from(["send"]).is_err(), "a body is needed");
        assert!(
            Command::try_parse_from(["send", "--body", "hi", "--ttl-hours", "2"]).is_err(),
            "a ttl needs --offline"
        );
    }
}
