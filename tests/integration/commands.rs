//! The commands for people at a terminal, against a standalone server.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::broadcastd::{App, Process};
use crate::support::guard::{Guarded, folder};
use crate::support::{SOON, until};

fn command(arguments: &[&str]) -> Guarded {
    let mut program = vec![env!("CARGO_BIN_EXE_broadcastd")];
    program.extend(arguments);
    Guarded::spawn(arguments[0], &program, &BTreeMap::new(), &folder("command").join("output"))
}

/// A file with a secret, as a file from an editor is: with a line end.
fn secret_file(secret: &str) -> String {
    let file = folder("secret").join("secret");
    std::fs::write(&file, format!("{secret}\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

async fn ended(mut process: Guarded) -> (Option<i32>, String) {
    let status = until("at its end", SOON, async || process.ended().ok_or("it runs")).await;
    (status.code(), process.output())
}

#[tokio::test]
async fn a_broadcast_sent_from_the_terminal_is_heard_in_another() {
    let app = App::new();
    let server =
        Process::new("standalone", std::slice::from_ref(&app)).with("embedded.path", "store.redb").start().await;
    let base = format!("http://127.0.0.1:{}", server.public_port());
    let url = server.device_url();

    let secret = secret_file(&app.secret);
    let minting = command(&["token", "--app", &app.key, "--account", "ann", "--secret-file", &secret]);
    let (code, token) = ended(minting).await;
    assert_eq!(code, Some(0), "{token}");

    let listener = ["listen", "--url", &url, "--app", &app.key, "--account", "ann", "--count", "1", "--json"];
    let listening = command(&[&listener[..], &["--token", token.trim()]].concat());
    until("a session", SOON, async || match server.metric("broadcastd_sessions").await {
        1.0 => Ok(()),
        sessions => Err(format!("{sessions}; it said: {}", listening.output())),
    })
    .await;
    let send = ["send", "--url", &base, "--app", &app.key, "--body", "hello", "--offline", "--secret-file"];
    let (code, answer) = ended(command(&[&send[..], &[&secret]].concat())).await;
    assert_eq!(code, Some(0), "{answer}");
    let (code, heard) = ended(listening).await;
    assert_eq!(code, Some(0), "{heard}");
    let line = heard.lines().find(|line| line.contains("hello")).unwrap_or_else(|| panic!("{heard}"));
    assert_eq!(serde_json::from_str::<Value>(line).unwrap()["content"], "hello");

    let (code, refusal) = ended(command(&[&send[..], &[&secret_file("another")]].concat())).await;
    assert!(code.is_some_and(|code| code != 0) && refusal.contains("414"), "{code:?} {refusal}");
    let (code, said) = ended(command(&[&listener[..], &["--token", "nonsense"]].concat())).await;
    assert!(code.is_some_and(|code| code != 0) && !said.contains("panicked"), "{code:?} {said}");
}

#[tokio::test]
async fn health_says_whether_a_server_is_ready() {
    let app = App::new();
    let mut server =
        Process::new("standalone", std::slice::from_ref(&app)).with("embedded.path", "store.redb").start().await;
    let address = server.admin_address();
    let (code, said) = ended(command(&["health", "--admin", &address])).await;
    assert_eq!(code, Some(0), "{said}");
    server.kill();
    let (code, said) = ended(command(&["health", "--admin", &address])).await;
    assert!(code.is_some_and(|code| code != 0) && !said.contains("panicked"), "{code:?} {said}");
}
