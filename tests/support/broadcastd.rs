//! The built binary, run as an operator runs it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::guard::{Guarded, folder};
use super::journal::Journal;
use super::{SOON, ports, unique, until};

/// An app of the settings.
#[derive(Debug, Clone)]
pub struct App {
    /// Its key.
    pub key: String,
    /// Its secret.
    pub secret: String,
    /// Whether broadcasts are activated.
    pub broadcast: bool,
    /// The limit in any minute.
    pub per_minute: u32,
    /// The limit in a day.
    pub per_day: u32,
    /// What its senders sent and were told.
    pub journal: Journal,
}

impl App {
    /// An app with the default limits and a key of its own.
    pub fn new() -> Self {
        let key = unique("app");
        let journal = Journal::default();
        Self { secret: format!("secret-of-{key}"), key, broadcast: true, per_minute: 10, per_day: 1000, journal }
    }

    /// An app with limits that no test meets.
    pub fn unlimited() -> Self {
        Self { per_minute: 1_000_000, per_day: 10_000_000, ..Self::new() }
    }

    /// An app for which broadcasts are not activated.
    pub fn off() -> Self {
        Self { broadcast: false, ..Self::new() }
    }

    fn toml(&self) -> String {
        let Self { key, secret, broadcast, per_minute, per_day, journal: _ } = self;
        format!(
            "[[apps]]\nkey = \"{key}\"\nsecret = \"{secret}\"\nbroadcast = {broadcast}\nper_minute = {per_minute}\n\
             per_day = {per_day}\n\n"
        )
    }
}

/// A process of one role: its settings, and the process itself while it runs.
#[derive(Debug)]
pub struct Process {
    role: String,
    arguments: Vec<String>,
    wrapper: Vec<String>,
    folder: PathBuf,
    public: u16,
    admin: u16,
    environment: BTreeMap<String, String>,
    running: Option<Guarded>,
}

impl Process {
    /// A role that does not run yet, with ports of its own, all apps, and a quick drain.
    pub fn new(role: &str, apps: &[App]) -> Self {
        let folder = folder(role);
        let apps: String = apps.iter().map(App::toml).collect();
        std::fs::write(folder.join("broadcastd.toml"), apps).unwrap();
        let (public, admin) = (ports::free(), ports::free());
        let process = Self {
            role: role.to_owned(),
            arguments: Vec::new(),
            wrapper: Vec::new(),
            folder,
            public,
            admin,
            environment: BTreeMap::new(),
            running: None,
        };
        process
            .with("listen.public", format!("127.0.0.1:{public}"))
            .with("listen.admin", format!("127.0.0.1:{admin}"))
            .with("drain.notice_seconds", "0")
            .with("drain.deadline_seconds", "10")
            .with("log.level", "debug")
    }

    /// Sets one key, by the environment: `redis.url` is `BROADCASTD__REDIS__URL`.
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        let variable = format!("BROADCASTD__{}", key.to_uppercase().replace('.', "__"));
        self.environment.insert(variable, value.into());
        self
    }

    /// Sets a variable of its environment that is no setting.
    fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// What is to happen at the named points of the code, from the next start on: see `src/failpoint.rs`.
    pub fn failpoints(self, text: &str) -> Self {
        self.variable("FAILPOINTS", text)
    }

    /// None of that from the next start on.
    pub fn without_failpoints(&mut self) {
        self.environment.remove("FAILPOINTS");
    }

    /// Runs it by another program, which is given this one and its arguments: `setpriv --reuid=65534 --`.
    pub fn by(mut self, program: &[&str]) -> Self {
        self.wrapper = program.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Gives it a system clock that is off by so many seconds.
    pub fn clock_off(mut self, seconds: i64) -> Self {
        self.environment.extend(super::clock::off(seconds));
        self
    }

    /// Adds arguments behind the role.
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Puts text at the head of the settings file.
    pub fn settings(self, text: &str) -> Self {
        let path = self.folder.join("broadcastd.toml");
        let apps = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, format!("{text}\n{apps}")).unwrap();
        self
    }

    /// Runs it; it may not be ready yet, or end at once.
    pub fn spawn(&mut self) {
        let file = self.folder.join("broadcastd.toml");
        let mut program: Vec<&str> = self.wrapper.iter().map(String::as_str).collect();
        program.extend([env!("CARGO_BIN_EXE_broadcastd"), "--config", file.to_str().unwrap()]);
        program.extend(self.role.split(' '));
        program.extend(self.arguments.iter().map(String::as_str));
        let name = format!("broadcastd {} ({})", self.role, self.folder.display());
        self.running = Some(Guarded::spawn(&name, &program, &self.environment, &self.folder.join("output")));
    }

    /// Whether it stands still at a failpoint (or was stopped otherwise).
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    }

    /// Waits until it stands still: by [`Process::pause`], or at a failpoint.
    pub async fn wait_stopped(&self) {
        until("stopped", SOON, async || if self.is_stopped() { Ok(()) } else { Err("it runs") }).await;
    }

    /// Waits until it has ended by itself, by a failpoint say, and forgets it; returns how.
    pub async fn wait_killed(&mut self) -> ExitStatus {
        self.wait(SOON).await
    }

    /// Resident memory now, and the most there has been, in KiB.
    pub fn memory_kib(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let figure = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (figure("VmRSS:"), figure("VmHWM:"))
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("it runs").pid()
    }

    /// Runs it and waits until it is ready.
    pub async fn start(mut self) -> Self {
        self.spawn();
        self.wait_ready().await;
        self
    }

    /// Runs it again, on the same ports, after [`Process::kill`] or [`Process::drain`].
    pub async fn restart(&mut self) {
        self.spawn();
        self.wait_ready().await;
    }

    /// Waits until `/readyz` answers 200.
    pub async fn wait_ready(&mut self) {
        let what = format!("ready: {}", self.role);
        until(&what, SOON, async || {
            if let Some(status) = self.running.as_mut().expect("it was started").ended() {
                panic!("{} ended with {status}; it said:\n{}", self.role, self.output());
            }
            match self.readiness().await {
                Ok((200, _)) => Ok(()),
                Ok((status, body)) => Err(format!("{status} {body}")),
                Err(error) => Err(error),
            }
        })
        .await;
    }

    /// Waits until `/readyz` answers something else than 200; returns its body.
    pub async fn wait_unready(&self) -> Value {
        until("not ready", SOON, async || match self.readiness().await? {
            (200, body) => Err(format!("still ready: {body}")),
            (_, body) => Ok(serde_json::from_str(&body).unwrap_or(Value::String(body))),
        })
        .await
    }

    /// The status and body of `/readyz`.
    pub async fn readiness(&self) -> Result<(u16, String), String> {
        get(format!("http://127.0.0.1:{}/readyz", self.admin)).await
    }

    /// Everything that `/metrics` says.
    pub async fn metrics(&self) -> String {
        let (status, text) = get(format!("http://127.0.0.1:{}/metrics", self.admin)).await.unwrap();
        assert_eq!(status, 200, "{text}");
        text
    }

    /// One metric, summed over its labels; 0 if it is not there.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        text.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    /// Where the server API is.
    pub fn api_url(&self) -> String {
        format!("http://127.0.0.1:{}/nimserver", self.public)
    }

    /// Where devices connect.
    pub fn device_url(&self) -> String {
        format!("ws://127.0.0.1:{}/ws", self.public)
    }

    /// Where health and metrics are served.
    pub fn admin_address(&self) -> String {
        format!("127.0.0.1:{}", self.admin)
    }

    /// The port of the public listener.
    pub fn public_port(&self) -> u16 {
        self.public
    }

    /// The folder that it runs in.
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// SIGTERM.
    pub fn term(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGTERM, and the end; fails the test at the deadline.
    pub async fn drain(&mut self, deadline: Duration) -> ExitStatus {
        self.term();
        self.wait(deadline).await
    }

    /// Waits for its end; fails the test at the deadline.
    pub async fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let output = self.folder.join("output");
        let running = self.running.as_mut().expect("it runs");
        let status = until("at its end", deadline, async || match running.ended() {
            Some(status) => Ok(status),
            None => Err(std::fs::read_to_string(&output).unwrap_or_default()),
        })
        .await;
        self.running = None;
        status
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.running.take().expect("it runs").kill();
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        self.running.as_ref().expect("it runs").signal(signal);
    }

    /// What it has written to its standard output and error, over all its runs.
    pub fn output(&self) -> String {
        std::fs::read_to_string(self.folder.join("output")).unwrap_or_default()
    }
}

/// The status and the body of a page.
pub async fn get(url: String) -> Result<(u16, String), String> {
    tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(5)))
            .build()
            .into();
        let mut response = agent.get(&url).call().map_err(|error| error.to_string())?;
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok((response.status().as_u16(), text))
    })
    .await
    .unwrap()
}
