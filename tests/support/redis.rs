//! Private Redis servers. Their users are those of `deploy/redis/users.acl`, under the prefixes of the tests; beside them the
//! default user stays, without a password, for what the tests themselves do.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use broadcastd::ledger::LedgerSettings;
use broadcastd::ledger::redis::{Mode, RedisLedger, RedisSettings};
use rustix::process::Signal;

use super::certificates::Certificate;
use super::disk::Disk;
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

/// The arguments of one that loses nothing.
pub const ALWAYS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// The ledger at this address, as a role has it, for what a test asks of it directly. Behind Sentinel: of `mymaster`.
pub fn ledger(url: &str, mode: Mode, key_prefix: &str) -> RedisLedger {
    let settings = RedisSettings {
        url: url.into(),
        url_file: String::new(),
        mode,
        sentinel_service: "mymaster".to_owned(),
        sentinel_username: String::new(),
        sentinel_password: String::new().into(),
        sentinel_password_file: String::new(),
        key_prefix: key_prefix.to_owned(),
        ca_file: String::new(),
        client_certificate_file: String::new(),
        client_key_file: String::new(),
        connect_timeout_ms: 5000,
        response_timeout_ms: 30_000,
        test_clock_key: None,
    };
    RedisLedger::start(settings, LedgerSettings { log_length: 1000, log_hours: 1 })
}

/// One redis-server. It is killed when dropped.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    tls: Option<Certificate>,
    environment: BTreeMap<String, String>,
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
        Self::make(arguments, None, [])
    }

    /// The same, whose syncs wait for as long as the test wants.
    pub fn on_disk(disk: &Disk, arguments: &[&str]) -> Self {
        Self::make(arguments, None, disk.environment())
    }

    /// One that takes TLS connections only; from clients with a certificate of the same authority only, if `mutual`.
    pub fn with_tls(certificate: &Certificate, mutual: bool, arguments: &[&str]) -> Self {
        let Certificate { ca, certificate: own, key } = certificate;
        let clients = if mutual { "yes" } else { "no" };
        let tls =
            ["--tls-ca-cert-file", ca, "--tls-cert-file", own, "--tls-key-file", key, "--tls-auth-clients", clients];
        Self::make(&[&tls, arguments].concat(), Some(certificate.clone()), [])
    }

    fn make(
        arguments: &[&str],
        tls: Option<Certificate>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let environment = environment.into_iter().collect();
        let mut redis =
            Self { port: ports::free(), folder: folder("redis"), arguments, tls, environment, process: None };
        // Only what is listed may log in, but for the tests' own tools: replicas and Sentinels come in by the default user too.
        let users = users("t-*").replace("user default off", "user default on nopass ~* &* +@all");
        std::fs::write(redis.folder.join("users.acl"), users).unwrap();
        redis.start();
        redis
    }

    /// One with an append-only file that is synced before each answer: what has been answered is in it.
    pub fn durable() -> Self {
        Self::dedicated(&ALWAYS)
    }

    /// The append-only file that is written to now.
    pub fn append_only_file(&self) -> PathBuf {
        self.folder.join("appendonlydir/appendonly.aof.1.incr.aof")
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

    /// Its process id, while it runs.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").pid()
    }

    /// Where its files are.
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// What it has written to its log.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.folder.join("output")).unwrap_or_default()
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
        self.process = Some(Guarded::spawn("redis", &program, &self.environment, &self.folder.join("output")));
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

/// A server that is to be part of a cluster.
fn cluster_server(tls: Option<&Certificate>, arguments: &[&str]) -> Redis {
    // The default cluster port is the port + 10000, which may not be free.
    let bus = ports::free().to_string();
    let in_cluster = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "2000"];
    let arguments = [&in_cluster, arguments].concat();
    match tls {
        None => Redis::dedicated(&arguments),
        Some(certificate) => Redis::with_tls(certificate, false, &[&arguments[..], &["--tls-cluster", "yes"]].concat()),
    }
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
        Self::make(None, &[])
    }

    /// The same, of servers with these arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::make(None, arguments)
    }

    /// One that speaks TLS only, between its servers too. The certificate is for `localhost` and `127.0.0.1`.
    pub fn with_tls(certificate: &Certificate) -> Self {
        Self::make(Some(certificate), &[])
    }

    fn make(tls: Option<&Certificate>, arguments: &[&str]) -> Self {
        let masters: Vec<Redis> = (0..3).map(|_| cluster_server(tls, arguments)).collect();
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

    /// The addresses of all its masters, for `redis.url`.
    pub fn urls(&self) -> String {
        self.masters.iter().map(Redis::url).collect::<Vec<_>>().join(",")
    }

    /// Adds a replica of one of the masters, caught up with it.
    pub fn replica(&self, of: usize) -> Redis {
        let replica = cluster_server(None, &[]);
        let master = &self.masters[of];
        let known = format!("127.0.0.1:{}", master.port);
        let (new, id) = (format!("127.0.0.1:{}", replica.port), master.command(&["CLUSTER", "MYID"]));
        let add = ["--cluster", "add-node", &new, &known, "--cluster-slave", "--cluster-master-id", &id];
        let output = Command::new("redis-cli").args(add).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        until_blocking("a replica", SOON, || match replica.try_command(&["INFO", "replication"])? {
            info if info.contains("master_link_status:up") => Ok(()),
            info => Err(info),
        });
        replica
    }

    /// Its masters.
    pub fn masters(&self) -> &[Redis] {
        &self.masters
    }
    /// The same, to kill and start them.
    pub fn masters_mut(&mut self) -> &mut [Redis] {
        &mut self.masters
    }

    /// Which slot the keys of `tag` are in.
    pub fn slot(&self, tag: &str) -> u32 {
        self.masters[0].command(&["CLUSTER", "KEYSLOT", &format!("{{{tag}}}")]).parse().unwrap()
    }

    /// Which of the masters serves a slot, by its own account.
    pub fn owner(&self, slot: u32) -> usize {
        let serves = |master: &Redis| {
            let nodes = master.command(&["CLUSTER", "NODES"]);
            let myself = nodes.lines().find(|line| line.contains("myself")).unwrap().to_owned();
            // A slot that is on its way is in brackets.
            myself.split(' ').skip(8).filter(|range| !range.starts_with('[')).any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                (first.parse::<u32>().unwrap()..=last.parse().unwrap()).contains(&slot)
            })
        };
        self.masters.iter().position(serves).expect("a master serves it")
    }
}

/// A slot on its way from one master to another.
#[derive(Debug)]
pub struct Move<'a> {
    cluster: &'a RedisCluster,
    slot: String,
    from: usize,
    to: usize,
}

impl<'a> Move<'a> {
    /// From here on the old master sends those who ask for a key that it has not to the new one.
    pub fn begin(cluster: &'a RedisCluster, slot: u32, to: usize) -> Self {
        let this = Self { cluster, slot: slot.to_string(), from: cluster.owner(slot), to };
        assert_ne!(this.from, this.to);
        let id = |master: usize| cluster.masters[master].command(&["CLUSTER", "MYID"]);
        cluster.masters[to].command(&["CLUSTER", "SETSLOT", &this.slot, "IMPORTING", &id(this.from)]);
        cluster.masters[this.from].command(&["CLUSTER", "SETSLOT", &this.slot, "MIGRATING", &id(to)]);
        this
    }

    /// Moves so many of its keys at the most; returns how many are left.
    pub fn keys(&self, most: usize) -> usize {
        let from = &self.cluster.masters[self.from];
        let keys = from.command(&["CLUSTER", "GETKEYSINSLOT", &self.slot, &most.to_string()]);
        if !keys.is_empty() {
            let port = self.cluster.masters[self.to].port.to_string();
            let mut migrate = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            migrate.extend(keys.lines());
            from.command(&migrate);
        }
        from.command(&["CLUSTER", "COUNTKEYSINSLOT", &self.slot]).parse().unwrap()
    }

    /// Moves the rest, and has the new master serve it.
    pub fn finish(self) {
        while self.keys(100) > 0 {}
        let id = self.cluster.masters[self.to].command(&["CLUSTER", "MYID"]);
        // The new one first: nobody may be sent to one that does not know.
        for master in [self.to, self.from].into_iter().chain((0..3).filter(|at| ![self.to, self.from].contains(at))) {
            self.cluster.masters[master].command(&["CLUSTER", "SETSLOT", &self.slot, "NODE", &id]);
        }
    }
}
