//! A master, its replica, and three Sentinels that watch them.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::guard::{Guarded, folder};
use super::redis::Redis;
use super::{ports, until, until_blocking};

/// How long a failover may take on a busy machine.
const FAILOVER: Duration = Duration::from_secs(60);

/// The name under which the Sentinels know the master.
pub const SERVICE: &str = "mymaster";

/// One Sentinel.
#[derive(Debug)]
pub struct Sentinel {
    port: u16,
    password: Option<String>,
    process: Guarded,
}

impl Sentinel {
    /// Watches the master at this port of 127.0.0.1: gone after a second without an answer, by two votes. `password`: what it
    /// asks of its clients, the other Sentinels included. `settings`: more of them.
    pub fn start(master: u16, password: Option<&str>, settings: &str) -> Self {
        let (port, folder) = (ports::free(), folder("sentinel"));
        let mut file_text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor {SERVICE} 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds {SERVICE} 1000\nsentinel failover-timeout {SERVICE} 5000\n\
             {settings}\n"
        );
        if let Some(password) = password {
            file_text += &format!("requirepass {password}\nsentinel sentinel-pass {password}\n");
        }
        let file = folder.join("sentinel.conf");
        std::fs::write(&file, file_text).unwrap();
        let program = ["redis-server", file.to_str().unwrap(), "--sentinel"];
        let process = Guarded::spawn("sentinel", &program, &BTreeMap::new(), &folder.join("output"));
        let sentinel = Self { port, password: password.map(str::to_owned), process };
        until_blocking("a Sentinel", super::SOON, || sentinel.master());
        sentinel
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port of what it calls the master.
    pub fn master(&self) -> Result<u16, String> {
        let answer = self.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE])?;
        answer.lines().last().and_then(|port| port.parse().ok()).ok_or(answer)
    }

    /// The answer to one command.
    pub fn command(&self, command: &[&str]) -> Result<String, String> {
        let mut cli = Command::new("redis-cli");
        cli.args(["-e", "--raw", "-p", &self.port.to_string()]);
        if let Some(password) = &self.password {
            cli.args(["--no-auth-warning", "-a", password]);
        }
        let output = cli.args(command).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// SIGSTOP: it answers nothing and votes for nobody.
    pub fn pause(&self) {
        self.process.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process.signal(Signal::CONT);
    }
}

/// The Sentinels of one master.
#[derive(Debug)]
pub struct Sentinels {
    all: Vec<Sentinel>,
}

impl Sentinels {
    /// Three, once they know each other and the replica. See [`Sentinel::start`].
    pub fn watch(master: u16, password: Option<&str>, settings: &str) -> Self {
        let sentinels = Self { all: (0..3).map(|_| Sentinel::start(master, password, settings)).collect() };
        for sentinel in &sentinels.all {
            until_blocking("a quorum", FAILOVER, || {
                let details = sentinel.command(&["SENTINEL", "MASTER", SERVICE])?;
                let lines: Vec<&str> = details.lines().collect();
                let field = |name: &str| lines.chunks(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
                match (field("num-slaves"), field("num-other-sentinels"), field("flags")) {
                    (Some("1"), Some("2"), Some("master")) => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            });
        }
        sentinels
    }

    /// Their addresses, for `redis.url`.
    pub fn url(&self) -> String {
        let urls: Vec<String> = self.all.iter().map(|one| format!("redis://127.0.0.1:{}", one.port)).collect();
        urls.join(",")
    }

    /// They themselves.
    pub fn all(&self) -> &[Sentinel] {
        &self.all
    }

    /// Waits until all of them name this port.
    pub async fn wait_for(&self, master: u16) {
        for sentinel in &self.all {
            until("another master", FAILOVER, async || match sentinel.master()? {
                port if port == master => Ok(()),
                port => Err(format!("still {port}")),
            })
            .await;
        }
    }

    /// Has the replica promoted while the master is well.
    pub fn failover(&self) {
        until_blocking("a failover", FAILOVER, || self.all[0].command(&["SENTINEL", "FAILOVER", SERVICE]));
    }
}

/// A replica of what listens on this port of 127.0.0.1, caught up with it.
pub fn replica(of: u16, arguments: &[&str]) -> Redis {
    let of = of.to_string();
    let mut all = vec!["--replicaof", "127.0.0.1", &of, "--repl-diskless-sync-delay", "0"];
    all.extend(arguments);
    let replica = Redis::dedicated(&all);
    until_blocking("a replica", super::SOON, || match replica.command(&["INFO", "replication"]) {
        info if info.contains("master_link_status:up") => Ok(()),
        info => Err(info),
    });
    replica
}
