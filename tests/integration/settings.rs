//! What an operator gets wrong: one clear sentence, and a non-zero exit.

use std::net::TcpListener;

use crate::support::SOON;
use crate::support::broadcastd::{App, Process};

/// sysexits: EX_CONFIG.
const BAD_CONFIGURATION: i32 = 78;

/// Runs it to its end: the exit code and what it said.
async fn run(mut process: Process) -> (i32, String) {
    process.spawn();
    let status = process.wait(SOON).await;
    (status.code().expect("an exit code, not a signal"), process.output())
}

fn one_sentence(output: &str) {
    let lines: Vec<&str> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "one sentence, not:\n{output}");
    assert!(!output.contains("panicked") && !output.contains("backtrace"), "{output}");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    for role in ["standalone", "node", "api"] {
        let process = Process::new(role, &[App::new()]).with("log.level", "error").with("embedded.path", "store.redb");
        let port = process.public_port();
        let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let (code, output) = run(process).await;
        assert_ne!(code, 0, "{role}: {output}");
        assert!(output.contains(&port.to_string()), "{role}: {output}");
        one_sentence(&output);
    }
}

#[tokio::test]
async fn bad_settings_are_named_and_exit_78() {
    let worker = || Process::new("worker", &[App::new()]);
    for (process, named) in [
        (worker().with("amqp.prefetch", "many"), "prefetch"),
        (worker().with("amqp.prefetch", "0"), "prefetch"),
        (worker().with("amqp.url", "http://user:hunter2@x"), "amqp.url"),
        (worker().with("redis.url", "hunter2@@"), "redis.url"),
        (worker().with("redis.mode", "ring"), "mode"),
        (worker().with("listen.admin", "everywhere"), "admin"),
        (worker().with("no.such_key", "1"), "no"),
        (worker().with("amqp.prefech", "1"), "prefech"),
        (worker().settings("[amqp]\nprefech = 1\n"), "prefech"),
        (worker().settings("this is no TOML\n"), "broadcastd.toml"),
        (worker().settings("[[apps]]\nkey = \"a b\"\nsecret = \"x\"\n"), "a b"),
        (worker().arguments(&["--config", "/no/such/file"]), "/no/such/file"),
    ] {
        let (code, output) = run(process).await;
        assert_eq!(code, BAD_CONFIGURATION, "{named}: {output}");
        assert!(output.contains(named), "{named}: {output}");
        assert!(!output.contains("hunter2"), "a password is printed: {output}");
        one_sentence(&output);
    }
}

#[tokio::test]
async fn config_check_prints_what_is_in_force_without_secrets() {
    let app = App::new();
    let process = Process::new("config check", std::slice::from_ref(&app))
        .with("redis.url", "redis://user:hunter2@example.com:1")
        .with("amqp.prefetch", "77");
    let (code, output) = run(process).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("prefetch = 77") && output.contains(&app.key), "{output}");
    assert!(!output.contains("hunter2") && !output.contains(&app.secret), "{output}");
}
