//! Private Redis servers. Their users are those of `deploy/redis/users.acl`, under the prefixes of the tests; beside them the
//! default user stays, without a password, for what the tests themselves do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::process::Signal;

use super::certificates::Certificate;
use super::guard::{Guarded, folder};
use super::{SOON, ports, unique, until_blocking};

/// The users as they are committed.
const USERS: &str = include_str!("../../deploy/redis/users.acl");

/// The user and password of `users.acl`.
pub const LOGIN: &str = "broadcastd:change-me";

/// `users.acl` for keys of this prefix; `*` at its end stands for all that begin so.
pub fn users(prefix: &str) -> String {
    let users = USERS.replace("~bc:*", &format!("~{prefix}")).replace("&bc:*", &format!("&{prefix}"));
    assert_eq!(users.matches(prefix).count(), 2, "keys and channels of {USERS}");
    users
}

/// One redis-server. It is killed when dropped.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    tls: Option<Certificate>,
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
        Self::make(arguments, None)
    }

    /// One that takes TLS connections only; from clients with a certificate of the same authority only, if `mutual`.
    pub fn with_tls(certificate: &Certificate, mutual: bool, arguments: &[&str]) -> Self {
        let Certificate { ca, certificate: own, key } = certificate;
        let clients = if mutual { "yes" } else { "no" };
        let tls =
            ["--tls-ca-cert-file", ca, "--tls-cert-file", own, "--tls-key-file", key, "--tls-auth-clients", clients];
        Self::make(&[&tls, arguments].concat(), Some(certificate.clone()))
    }

    fn make(arguments: &[&str], tls: Option<Certificate>) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut redis = Self { port: ports::free(), folder: folder("redis"), arguments, tls, process: None };
        // Only what is listed may log in, but for the tests' own tools: replicas and Sentinels come in by the default user too.
        let users = users("t-*").replace("user default off", "user default on nopass ~* &* +@all");
        std::fs::write(redis.folder.join("users.acl"), users).unwrap();
        redis.start();
        redis
    }

    /// One with an append-only file, synced every second: the durable setting that the documentation recommends.
    pub fn durable() -> Self {
        Self::dedicated(&["--appendonly", "yes", "--appendfsync", "everysec"])
    }

    /// Its address, for broadcastd: with the user of `users.acl`.
    pub fn url(&self) -> String {
        // Certificates name the host.
        let (scheme, host) = if self.tls.is_some() { ("rediss", "localhost") } else { ("redis", "127.0.0.1") };
        format!("{scheme}://{LOGIN}@{host}:{}", self.port)
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
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
        let users = self.folder.join("users.acl");
        let mut program = vec!["redis-server", "--bind", "127.0.0.1", "--dir", folder, "--save", ""];
        program.extend(if self.tls.is_some() {
            ["--port", "0", "--tls-port", &port]
        } else {
            ["--port", &port, "--tls-port", "0"]
        });
        program.extend(["--aclfile", users.to_str().unwrap()]);
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

    /// The same, or what was wrong with it.
    pub fn try_command(&self, command: &[&str]) -> Result<String, String> {
        let output = redis_cli(self.port, self.tls.as_ref()).arg("--raw").args(command).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The answer to one command, as redis-cli prints it raw.
    pub fn command(&self, command: &[&str]) -> String {
        self.try_command(command).unwrap()
    }
}

fn redis_cli(port: u16, tls: Option<&Certificate>) -> Command {
    let mut cli = Command::new("redis-cli");
    cli.args(["-e", "-p", &port.to_string()]);
    if let Some(Certificate { ca, certificate, key }) = tls {
        cli.args(["--tls", "--cacert", ca, "--cert", certificate, "--key", key]);
    }
    cli
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
        Self::make(None)
    }

    /// One that speaks TLS only, between its servers too. The certificate is for `localhost` and `127.0.0.1`.
    pub fn with_tls(certificate: &Certificate) -> Self {
        Self::make(Some(certificate))
    }

    fn make(tls: Option<&Certificate>) -> Self {
        let masters: Vec<Redis> = (0..3)
            .map(|_| {
                let bus = ports::free().to_string();
                // The default cluster port is the port + 10000, which may not be free.
                let cluster = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "2000"];
                match tls {
                    None => Redis::dedicated(&cluster),
                    Some(certificate) => {
                        Redis::with_tls(certificate, false, &[&cluster[..], &["--tls-cluster", "yes"]].concat())
                    }
                }
            })
            .collect();
        let addresses: Vec<String> = masters.iter().map(|master| format!("127.0.0.1:{}", master.port)).collect();
        let mut create = vec!["--cluster", "create"];
        create.extend(addresses.iter().map(String::as_str));
        create.push("--cluster-yes");
        let output = redis_cli(masters[0].port, tls).args(&create).output().unwrap();
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
