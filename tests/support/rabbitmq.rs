//! Private RabbitMQ servers, with the management plugin: it makes a vhost in 50 ms, where rabbitmqctl takes a second.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::certificates::Certificate;
use super::guard::{Guarded, folder};
use super::{ports, unique, until_blocking};

/// `guest:guest`, for basic authentication.
const GUEST: &str = "Basic Z3Vlc3Q6Z3Vlc3Q=";

/// What the tests themselves do, they do as this user, who may do everything.
pub const ADMINISTRATOR: &str = "guest:guest";

/// The users whose permissions `deploy/rabbitmq/README.md` writes down, with the passwords that they have here.
pub const USERS: [(&str, &str); 3] =
    [("broadcastd", "broadcastd-password"), ("api", "api-password"), ("BACKEND", "backend-password")];

/// The permissions of one of [`USERS`], as they are committed: configure, write, read.
pub fn permissions(user: &str) -> [String; 3] {
    let readme = include_str!("../../deploy/rabbitmq/README.md");
    let command = format!("set_permissions -p broadcast {user} ");
    let (_, rest) = readme.split_once(&command).unwrap_or_else(|| panic!("the README has no {command}"));
    let quoted: Vec<&str> = rest.split("\n\n").next().unwrap().split('\'').skip(1).step_by(2).collect();
    let [configure, write, read] = quoted[..] else { panic!("three patterns, not {quoted:?}") };
    [configure, write, read].map(str::to_owned)
}

/// The same address as another user.
pub fn as_user(url: &str, login: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap();
    format!("{scheme}://{login}@{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host))
}

/// An Erlang node takes 5 to 10 s to come up here, and minutes when the machine is busy enough.
const BOOT: Duration = Duration::from_secs(300);

/// One rabbitmq-server. It is killed when dropped.
#[derive(Debug)]
pub struct RabbitMq {
    port: u16,
    management: u16,
    folder: PathBuf,
    environment: BTreeMap<String, String>,
    tls: bool,
    process: Option<Guarded>,
}

static SHARED: LazyLock<RabbitMq> = LazyLock::new(RabbitMq::dedicated);

impl RabbitMq {
    /// The one that all tests share; each takes a [`RabbitMq::vhost`].
    pub fn shared() -> &'static Self {
        &SHARED
    }

    /// One that a test may restart, freeze and fill.
    pub fn dedicated() -> Self {
        Self::make(None, "")
    }

    /// The same, with more lines in its rabbitmq.conf.
    pub fn with_settings(more: &str) -> Self {
        Self::make(None, more)
    }

    /// One that takes TLS connections only; from clients with a certificate of the same authority only, if `mutual`.
    pub fn with_tls(certificate: &Certificate, mutual: bool) -> Self {
        Self::make(Some((certificate, mutual)), "")
    }

    fn make(tls: Option<(&Certificate, bool)>, more: &str) -> Self {
        let folder = folder("rabbitmq");
        let (port, management) = (ports::free(), ports::free());
        std::fs::write(folder.join("plugins"), "[rabbitmq_management].").unwrap();
        let listener = match tls {
            None => format!("listeners.tcp.default = 127.0.0.1:{port}\n"),
            Some((Certificate { ca, certificate, key }, mutual)) => format!(
                "listeners.tcp = none\nlisteners.ssl.default = 127.0.0.1:{port}\n\
                 ssl_options.cacertfile = {ca}\nssl_options.certfile = {certificate}\nssl_options.keyfile = {key}\n\
                 ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = {mutual}\n"
            ),
        };
        let settings = format!(
            "{listener}\
             management.tcp.ip = 127.0.0.1\n\
             management.tcp.port = {management}\n\
             # A test may run on a disk with little room; the alarm has tests of its own.\n\
             disk_free_limit.absolute = 1MB\n\
             {more}\n"
        );
        std::fs::write(folder.join("rabbitmq.conf"), settings).unwrap();
        let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let environment = [
            // The node finds its peers, and rabbitmqctl the node, by a cookie in the home folder and by a port mapper; both
            // are private, so that no other RabbitMQ on the machine notices.
            ("HOME", at("")),
            ("ERL_EPMD_PORT", ports::free().to_string()),
            ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
            ("RABBITMQ_NODENAME", format!("{}-{}@localhost", unique("test"), std::process::id())),
            ("RABBITMQ_DIST_PORT", ports::free().to_string()),
            ("RABBITMQ_MNESIA_BASE", at("data")),
            ("RABBITMQ_LOG_BASE", at("log")),
            ("RABBITMQ_LOGS", "-".to_owned()),
            ("RABBITMQ_ENABLED_PLUGINS_FILE", at("plugins")),
            ("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf")),
            ("RABBITMQ_CONF_ENV_FILE", "/dev/null".to_owned()),
            ("RABBITMQ_PID_FILE", at("pid")),
        ];
        let environment = environment.map(|(key, value)| (key.to_owned(), value)).into();
        let mut rabbitmq = Self { port, management, folder, environment, tls: tls.is_some(), process: None };
        rabbitmq.start();
        for (user, password) in USERS {
            rabbitmq.put(&format!("users/{user}"), &json!({ "password": password, "tags": "" }));
            rabbitmq.permit("/", user, &permissions(user));
        }
        rabbitmq
    }

    /// The address of a vhost, for broadcastd: with the user of that name. Prefer [`RabbitMq::vhost`].
    pub fn url(&self, vhost: &str) -> String {
        let (user, password) = USERS[0];
        // Certificates name the host.
        let (scheme, host) = if self.tls { ("amqps", "localhost") } else { ("amqp", "127.0.0.1") };
        format!("{scheme}://{user}:{password}@{host}:{}/{}", self.port, vhost.replace('/', "%2f"))
    }

    /// Its AMQP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Makes a new vhost and returns its address.
    pub fn vhost(&self) -> Vhost {
        let name = unique("v");
        self.management("PUT", &format!("vhosts/{name}")).unwrap();
        for (user, _) in USERS {
            self.permit(&name, user, &permissions(user));
        }
        Vhost { url: self.url(&name), name }
    }

    /// Gives a user permissions in a vhost: configure, write, read.
    pub fn permit(&self, vhost: &str, user: &str, [configure, write, read]: &[String; 3]) {
        let path = format!("permissions/{}/{user}", vhost.replace('/', "%2f"));
        self.put(&path, &json!({ "configure": configure, "write": write, "read": read }));
    }

    fn put(&self, path: &str, body: &Value) {
        let url = format!("http://127.0.0.1:{}/api/{path}", self.management);
        let put = ureq::put(&url).header("authorization", GUEST).content_type("application/json");
        put.send(body.to_string()).unwrap();
    }

    /// Starts it and waits until it takes connections.
    pub fn start(&mut self) {
        self.start_without_waiting();
        self.wait_ready();
    }

    /// Starts it.
    pub fn start_without_waiting(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        // epmd in the foreground stays in the process group; started by Erlang it would leave it, and stay behind.
        let script = format!("epmd & exec {}", server_script());
        let output = self.folder.join("output");
        self.process = Some(Guarded::spawn("rabbitmq", &["sh", "-c", &script], &self.environment, &output));
    }

    /// Waits until it takes connections.
    pub fn wait_ready(&self) {
        until_blocking("a RabbitMQ that is up", BOOT, || {
            // The last thing that the server does is to listen; the management plugin listens before that.
            std::net::TcpStream::connect(("127.0.0.1", self.port)).map_err(|error| error.to_string())?;
            self.management("GET", "overview")
        });
    }

    /// Has the server write down the names of its quorum queues. RabbitMQ 3.10 does so seconds after they were declared; killed
    /// before that it starts them anew, empty and without a leader. (A restart in good order does not lose them.) It takes a
    /// second or two, so call it before there is load.
    pub fn settle_new_queues(&self) {
        self.control(&["eval", "[dets:sync(Table) || Table <- dets:all()]."]);
    }

    /// SIGKILL to the whole server. If it has new queues: [`RabbitMq::settle_new_queues`] first.
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Stops it in good order.
    pub fn stop(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::TERM);
        process.wait(BOOT);
    }

    /// SIGSTOP: it keeps its connections and answers nothing.
    pub fn pause(&self) {
        self.process.as_ref().expect("it runs").signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.process.as_ref().expect("it runs").signal(Signal::CONT);
    }

    /// Raises (or clears) the memory alarm, which blocks every connection that publishes.
    pub fn memory_alarm(&self, on: bool) {
        self.control(&["set_vm_memory_high_watermark", if on { "0.000001" } else { "0.6" }]);
    }

    /// Closes every connection to the vhost from the server's side.
    pub fn close_connections(&self, vhost: &Vhost) -> usize {
        let connections = self.management("GET", &format!("vhosts/{}/connections", vhost.name)).unwrap();
        let names: Vec<String> = connections
            .as_array()
            .unwrap()
            .iter()
            .map(|connection| connection["name"].as_str().unwrap().replace(' ', "%20").replace('>', "%3E"))
            .collect();
        for name in &names {
            let _ = self.management("DELETE", &format!("connections/{name}"));
        }
        names.len()
    }

    /// Runs rabbitmqctl. A second or two.
    pub fn control(&self, arguments: &[&str]) -> String {
        let output = Command::new("sh")
            .arg("-c")
            .arg(format!("exec {} \"$@\"", server_script().replace("rabbitmq-server", "rabbitmqctl")))
            .arg("rabbitmqctl")
            .args(arguments)
            .envs(&self.environment)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Asks the management API; its answer, or null where it has none.
    pub fn management(&self, method: &str, path: &str) -> Result<Value, String> {
        let url = format!("http://127.0.0.1:{}/api/{path}", self.management);
        let request = ureq::http::Request::builder().method(method).uri(url).header("authorization", GUEST).body(());
        let mut response = ureq::run(request.unwrap()).map_err(|error| error.to_string())?;
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        if text.is_empty() { Ok(Value::Null) } else { serde_json::from_str(&text).map_err(|e| e.to_string()) }
    }
}

/// The script itself where the package puts it: the one on the path is a wrapper that refuses every user but root and rabbitmq.
fn server_script() -> &'static str {
    const DEBIAN: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
    if std::path::Path::new(DEBIAN).exists() { DEBIAN } else { "rabbitmq-server" }
}

/// A vhost.
#[derive(Debug, Clone)]
pub struct Vhost {
    /// Its address, with broadcastd's user and password.
    pub url: String,
    /// Its name.
    pub name: String,
}
