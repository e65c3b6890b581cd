//! `broadcastd token`: a device's token.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use jsonwebtoken::{EncodingKey, Header, encode};
use secrecy::{ExposeSecret, SecretString};

use super::{SecretArgs, print_line};

/// Mint a device's token: a JWT (HS256 with the app's secret) that says which account it is
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Your backend mints the same: header {\"alg\":\"HS256\",\"typ\":\"JWT\"}, claims aud = the app's key, sub = the account,
exp = seconds since the Unix epoch, signed with the app's secret.

Examples:
  broadcastd token --account ada
  broadcastd token --app shop --secret-file shop.secret --account ada --ttl-hours 720")]
pub struct TokenArgs {
    /// The app's key
    #[arg(long, default_value = super::DEV_APP)]
    pub app: String,
    #[command(flatten)]
    secret: SecretArgs,
    /// The account that the device belongs to
    #[arg(long)]
    pub account: String,
    /// How long it is good, in hours
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
    pub ttl_hours: u32,
}

#[derive(serde::Serialize)]
struct Claims<'a> {
    aud: &'a str,
    sub: &'a str,
    exp: u64,
}

/// Mints a token that is good for `lifetime` from now.
///
/// # Errors
/// If it cannot be signed: never seen.
pub fn mint(app: &str, secret: &SecretString, account: &str, lifetime: Duration) -> anyhow::Result<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let claims = Claims { aud: app, sub: account, exp: now.saturating_add(lifetime).as_secs() };
    let key = EncodingKey::from_secret(secret.expose_secret().as_bytes());
    encode(&Header::default(), &claims, &key).context("the token cannot be signed")
}

/// Prints a token.
///
/// # Errors
/// If the secret is missing.
pub async fn run(args: TokenArgs) -> anyhow::Result<ExitCode> {
    let secret = args.secret.require(&args.app)?;
    let lifetime = Duration::from_secs(u64::from(args.ttl_hours) * 3600);
    print_line(&mint(&args.app, &secret, &args.account, lifetime)?)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};

    #[test]
    fn a_token_says_which_app_and_account_until_when() {
        let token = mint("demo", &"s".into(), "ada", Duration::from_secs(60)).unwrap();
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_audience(&["demo"]);
        let read = |secret: &[u8], validation: &Validation| {
            decode::<serde_json::Value>(&token, &DecodingKey::from_secret(secret), validation)
        };
        assert_eq!(read(b"s", &validation).unwrap().claims["sub"], "ada");
        assert!(read(b"other", &validation).is_err());
        validation.set_audience(&["other"]);
        assert!(read(b"s", &validation).is_err());
    }
}
