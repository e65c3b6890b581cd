//! The commands that a person runs against a server: send, listen, token, health, redrive, and the demo's script.
//!
//! They are clients like any other, and speak to the server over HTTP and WebSocket; only redrive speaks to the broker.

pub mod bench;
pub mod call;
pub mod demo;
pub mod device;
pub mod health;
pub mod listen;
pub mod redrive;
pub mod send;
pub mod token;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use secrecy::SecretString;

/// The app that `--dev` knows, and its secret.
const DEV_APP: &str = "demo";
const DEV_SECRET: &str = "demo-secret";

/// The app's secret, given in one of two ways.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SecretArgs {
    /// The app's secret. Other users of this machine can see it in the list of processes: prefer --secret-file
    #[arg(long, value_name = "SECRET", conflicts_with = "secret_file")]
    pub secret: Option<SecretString>,
    /// A file that holds the app's secret; white space around it is ignored
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
}

impl SecretArgs {
    /// The secret, if one is given.
    ///
    /// # Errors
    /// If the file cannot be read, or is empty.
    pub fn read(&self) -> anyhow::Result<Option<SecretString>> {
        let Some(path) = &self.secret_file else { return Ok(self.secret.clone()) };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the secret's file {} cannot be read", path.display()))?;
        let text = text.trim();
        anyhow::ensure!(!text.is_empty(), "the secret's file {} is empty", path.display());
        Ok(Some(text.into()))
    }

    /// The secret; the development app's is known.
    ///
    /// # Errors
    /// As [`SecretArgs::read`], or if none is given for another app.
    pub fn require(&self, app: &str) -> anyhow::Result<SecretString> {
        if let Some(secret) = self.read()? {
            return Ok(secret);
        }
        anyhow::ensure!(app == DEV_APP, "give the secret of app {app} with --secret-file or --secret");
        Ok(DEV_SECRET.into())
    }
}

/// Prints a line to stdout; `false` if nobody reads it any more (`| head`), which ends a command quietly.
///
/// # Errors
/// Any other error of stdout.
fn print_line(line: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("stdout cannot be written"),
    }
}

/// A text on one line that cannot steer the reader's terminal.
fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

fn exit(success: bool) -> ExitCode {
    if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_comes_from_the_flag_the_file_or_the_development_app() {
        use secrecy::ExposeSecret;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "  s3cret\n").unwrap();
        let from_file = SecretArgs { secret: None, secret_file: Some(file.path().into()) };
        assert_eq!(from_file.require("other").unwrap().expose_secret(), "s3cret");
        std::fs::write(file.path(), "\n").unwrap();
        assert!(from_file.require("other").is_err());
        assert_eq!(SecretArgs::default().require("demo").unwrap().expose_secret(), "demo-secret");
        assert!(SecretArgs::default().require("other").is_err());
    }

    #[test]
    fn foreign_text_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2J\nb"), "a [2J b");
    }
}
