//! The servers that are compared, each a process of its own on the first core.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use broadcastd::command::bench::fleet::Plan;
use broadcastd::command::bench::server::Server;

use crate::support::guard::folder;
use crate::support::ports;

/// Bytes of a message's payload.
pub const BYTES: usize = 220;

/// Sends so many messages to every device.
pub type Send = Box<dyn FnMut(u32)>;

/// A server that runs.
pub struct Subject {
    pub name: String,
    pub server: Server,
    pub plan: Plan,
    pub send: Send,
    /// Ended when dropped.
    pub running: Running,
}

impl Subject {
    /// A metric of our node.
    pub async fn metric(&self, name: &str) -> f64 {
        match &self.running {
            Running::Ours(ours) => ours.node.metric(name).await,
            Running::Child(_) => unreachable!("only our node is asked"),
        }
    }
}

/// What ends with the subject.
#[allow(dead_code, reason = "held for its end")]
pub enum Running {
    Child(Killed),
    Ours(Box<super::ours::Ours>),
}

/// Killed when dropped.
pub struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `taskset -c CPU`, where there is more than one.
pub fn on_cpu(cpu: &str) -> Vec<String> {
    ["taskset", "-c", cpu].map(str::to_owned).into()
}

/// A plan of devices that only connect.
pub fn plain(port: u16, path: &str, devices: usize) -> Plan {
    Plan {
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        host: format!("127.0.0.1:{port}"),
        path: path.to_owned(),
        devices,
        first: 0,
        hello: Vec::new(),
        greetings: 0,
        at_once: 64,
        sources: Vec::new(),
    }
}

fn spawn(program: &str, arguments: &[&str], port: u16, settings: impl FnOnce(&mut Command)) -> Option<Child> {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", program]).args(arguments).stdin(Stdio::piped()).stdout(Stdio::null());
    settings(&mut command);
    let mut child = command.spawn().ok()?;
    for _ in 0..400 {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Some(child);
        }
        if child.try_wait().ok().flatten().is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    let _ = child.kill();
    None
}

fn by_lines(name: &str, mut child: Child, plan: Plan) -> Subject {
    let mut input: ChildStdin = child.stdin.take().unwrap();
    let send = Box::new(move |count| writeln!(input, "{count}").unwrap());
    let server = Server::Process(child.id());
    Subject { name: name.to_owned(), server, plan, send, running: Running::Child(Killed(child)) }
}

/// The bare send loop. `greeting`: so many frames of so many bytes for each who connects.
pub fn floor(devices: usize, greeting: (usize, usize)) -> Subject {
    floor_on("0", devices, greeting).0
}

/// The same on another core, with what it prints.
pub fn floor_on(cpu: &str, devices: usize, greeting: (usize, usize)) -> (Subject, ChildStdout) {
    let port = ports::free();
    let program = std::env::current_exe().unwrap();
    let numbers = [usize::from(port), BYTES, greeting.0, greeting.1].map(|number| number.to_string());
    let mut arguments = vec!["floor-node"];
    arguments.extend(numbers.iter().map(String::as_str));
    let printing = |command: &mut Command| {
        command.stdout(Stdio::piped());
    };
    let mut child = spawn(program.to_str().unwrap(), &arguments, port, printing).expect("the floor starts");
    super::ours::pin(child.id(), cpu);
    let output = child.stdout.take().unwrap();
    let mut plan = plain(port, "/ws", devices);
    plan.greetings = u32::try_from(greeting.0).unwrap();
    (by_lines("send loop", child, plan), output)
}

/// Where `tests/run peers` puts what npm has.
fn npm() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers")
}

fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/fanout/peers")
}

/// Bun's server, if it is installed.
pub fn bun(devices: usize) -> Option<Subject> {
    let bun = npm().join("node_modules/bun/bin/bun.exe");
    let port = ports::free();
    let script = peers().join("bun.js");
    let arguments = [script.to_str()?, &port.to_string(), &BYTES.to_string()];
    let child = spawn(bun.to_str()?, &arguments, port, |_| {})?;
    Some(by_lines("Bun (uWebSockets)", child, plain(port, "/", devices)))
}

/// A script for Node.js with a package from npm, if both are there.
pub fn node(name: &str, script: &str, package: &str, path: &str, hello: &[&str], devices: usize) -> Option<Subject> {
    if !npm().join("node_modules").join(package).exists() {
        return None;
    }
    let port = ports::free();
    // Where imports are looked for depends on where the script lies.
    let copy = npm().join(script);
    std::fs::copy(peers().join(script), &copy).ok()?;
    let child = spawn("node", &[copy.to_str()?, &port.to_string(), &BYTES.to_string()], port, |_| {})?;
    let mut plan = plain(port, path, devices);
    plan.hello = hello.iter().map(|&text| text.to_owned()).collect();
    plan.greetings = if hello.is_empty() { 0 } else { 2 };
    Some(by_lines(name, child, plan))
}

/// nchan in nginx, if it is installed.
pub fn nchan(devices: usize) -> Option<Subject> {
    let module = "/usr/lib/nginx/modules/ngx_nchan_module.so";
    if !Path::new(module).exists() {
        return None;
    }
    let (port, folder) = (ports::free(), folder("nchan"));
    let text = std::fs::read_to_string(peers().join("nginx.conf")).ok()?;
    let text = text.replace("FOLDER", folder.to_str()?).replace("MODULE", module).replace("PORT", &port.to_string());
    let file = folder.join("nginx.conf");
    std::fs::write(&file, text).ok()?;
    let arguments = ["-p", folder.to_str()?, "-c", file.to_str()?];
    let child = spawn("nginx", &arguments, port, |_| {})?;
    let url = format!("http://127.0.0.1:{port}/pub");
    let server = Server::Process(child.id());
    let send = Box::new(move |count| (0..count).for_each(|_| post(&url, "text/plain", "x".repeat(BYTES))));
    let plan = plain(port, "/ws", devices);
    Some(Subject { name: "nchan".to_owned(), server, plan, send, running: Running::Child(Killed(child)) })
}

/// Centrifugo, if it is on the path.
pub fn centrifugo(devices: usize) -> Option<Subject> {
    let port = ports::free();
    let file = peers().join("centrifugo.json");
    let port_text = port.to_string();
    let child = spawn("centrifugo", &["-c", file.to_str()?], port, |command| {
        command.env("CENTRIFUGO_HTTP_SERVER_PORT", &port_text).env("CENTRIFUGO_HTTP_SERVER_ADDRESS", "127.0.0.1");
        command.env("GOMAXPROCS", "1");
    })?;
    let url = format!("http://127.0.0.1:{port}/api/publish");
    let server = Server::Process(child.id());
    let data = "x".repeat(BYTES - 60);
    let body = format!(r#"{{"channel":"all","data":{{"m":"{data}"}}}}"#);
    let send = Box::new(move |count| (0..count).for_each(|_| post(&url, "application/json", body.clone())));
    let mut plan = plain(port, "/connection/websocket", devices);
    plan.hello = vec![r#"{"id":1,"connect":{}}"#.to_owned(), r#"{"id":2,"subscribe":{"channel":"all"}}"#.to_owned()];
    plan.greetings = 2;
    Some(Subject { name: "Centrifugo".to_owned(), server, plan, send, running: Running::Child(Killed(child)) })
}

fn post(url: &str, content_type: &str, body: String) {
    ureq::post(url).header("Content-Type", content_type).send(body).unwrap();
}
