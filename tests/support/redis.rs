//! Private Redis servers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::process::Signal;

use super::guard::{Guarded, folder};
use super::{SOON, ports, unique, until_blocking};

/// One redis-server. It is killed when dropped.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    process: Option<Guarded>,
}

static SHARED: LazyLock<Redis> = LazyLock::new(|| Redis::dedicated(&[]));

impl Redis {
    /// The one that all tests share; see [`Redis::prefix`].
    pub fn shared() -> &'static Self {
        &SHARED
    }

    /// A key prefix that no other test of this run has.
    pub fn prefix() -> String {
        format!("{}:", unique("t"))
    }

    /// One that a test may kill, freeze and fill. `arguments` as for redis-server.
    pub fn dedicated(arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut redis = Self { port: ports::free(), folder: folder("redis"), arguments, process: None };
        redis.start();
        redis
    }

    /// One with an append-only file, synced every second: the durable setting that the documentation recommends.
    pub fn durable() -> Self {
        Self::dedicated(&["--appendonly", "yes", "--appendfsync", "everysec"])
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").pid()
    }

    /// Where its files are.
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// Starts it and waits until it has loaded its data.
    pub fn start(&mut self) {
        self.start_without_waiting();
        self.wait_ready();
    }

    /// Starts it; it may still be loading.
    pub fn start_without_waiting(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let port = self.port.to_string();
        let folder = self.folder.to_str().unwrap();
        let mut program = vec!["redis-server", "--port", &port, "--bind", "127.0.0.1", "--dir", folder, "--save", ""];
        program.extend(self.arguments.iter().map(String::as_str));
        self.process = Some(Guarded::spawn("redis", &program, &BTreeMap::new(), &self.folder.join("output")));
    }

    fn wait_ready(&self) {
        until_blocking("answering PING", SOON, || match self.try_command(&["PING"]) {
            Ok(answer) if answer == "PONG" => Ok(()),
            Ok(answer) | Err(answer) => Err(answer),
        });
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// SIGSTOP: it keeps its connections and answers nothing.
    pub fn pause(&self) {
        self.process.as_ref().expect("it runs").signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process.as_ref().expect("it runs").signal(Signal::CONT);
    }

    fn try_command(&self, command: &[&str]) -> Result<String, String> {
        redis_cli(self.port, command)
    }

    /// The answer to one command, as redis-cli prints it raw.
    pub fn command(&self, command: &[&str]) -> String {
        self.try_command(command).unwrap()
    }
}

fn redis_cli(port: u16, command: &[&str]) -> Result<String, String> {
    let output =
        Command::new("redis-cli").args(["-e", "--raw", "-p", &port.to_string()]).args(command).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// A Redis Cluster of three masters.
#[derive(Debug)]
pub struct RedisCluster {
    masters: Vec<Redis>,
}

static CLUSTER: LazyLock<RedisCluster> = LazyLock::new(RedisCluster::start);

impl RedisCluster {
    /// The one that all tests share.
    pub fn shared() -> &'static Self {
        &CLUSTER
    }

    /// Starts one and waits until every master knows all slots to be served.
    pub fn start() -> Self {
        let masters: Vec<Redis> = (0..3)
            .map(|_| {
                let bus = ports::free().to_string();
                // The default cluster port is the port + 10000, which may not be free.
                Redis::dedicated(&[
                    "--cluster-enabled",
                    "yes",
                    "--cluster-port",
                    &bus,
                    "--cluster-node-timeout",
                    "2000",
                ])
            })
            .collect();
        let addresses: Vec<String> = masters.iter().map(|master| format!("127.0.0.1:{}", master.port)).collect();
        let mut create = vec!["--cluster", "create"];
        create.extend(addresses.iter().map(String::as_str));
        create.push("--cluster-yes");
        let output = Command::new("redis-cli").args(&create).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        for master in &masters {
            until_blocking("a whole cluster", Duration::from_secs(30), || {
                let info = master.try_command(&["CLUSTER", "INFO"])?;
                if info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3") {
                    Ok(())
                } else {
                    Err(info)
                }
            });
        }
        Self { masters }
    }

    /// The address of one of its masters; the others are found from there.
    pub fn url(&self) -> String {
        self.masters[0].url()
    }

    /// Its masters.
    pub fn masters(&self) -> &[Redis] {
        &self.masters
    }
}
