//! Child processes that cannot outlive this one, not even when it is killed with SIGKILL.
//!
//! A small shell, the warden, reads the process groups that were started from a pipe. The pipe ends when this process ends,
//! whatever the reason; the warden then kills every group that is left and removes the folder. A child starts only after the
//! warden knows of it: it waits for a line on its own standard input.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

const WARDEN: &str = r#"
trap '' INT TERM HUP
groups=' '
while read -r word group; do
    case $word in
        start) groups="$groups$group " ;;
        end) groups="${groups%% $group *} ${groups#* $group }" ;;
    esac
done
for group in $groups; do kill -9 "-$group" 2>/dev/null; done
# What was just killed may still be writing; a second time for what it wrote in between.
rm -rf "$1"; sleep 1; rm -rf "$1"
"#;

const WAIT_THEN_RUN: &str = r#"read -r go || exit 1; exec "$@" </dev/null"#;

struct Warden {
    orders: Mutex<ChildStdin>,
    // Kept, never waited for: it outlives this process.
    _process: Child,
    folder: PathBuf,
}

static WARDEN_PROCESS: LazyLock<Warden> = LazyLock::new(|| {
    let folder = tempfile::Builder::new().prefix("broadcastd-test-").tempdir().unwrap().keep();
    let mut warden = Command::new("sh")
        .args(["-c", WARDEN, "warden"])
        .arg(&folder)
        // A group of its own: Ctrl-C in a terminal must not reach it before it has cleared up.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Warden { orders: Mutex::new(warden.stdin.take().unwrap()), _process: warden, folder }
});

fn order(word: &str, group: u32) {
    let mut orders = WARDEN_PROCESS.orders.lock().unwrap();
    writeln!(orders, "{word} {group}").unwrap();
}

/// A new folder, removed when this process ends.
pub fn folder(name: &str) -> PathBuf {
    let folder = WARDEN_PROCESS.folder.join(super::unique(name));
    std::fs::create_dir(&folder).unwrap();
    folder
}

/// A child process and whatever it starts in its process group.
#[derive(Debug)]
pub struct Guarded {
    name: String,
    child: Child,
    output: PathBuf,
}

impl Guarded {
    /// Runs a program with its standard output and error appended to `output`. The environment is this process's, without
    /// what could point at somebody's real servers, and `environment`.
    pub fn spawn(name: &str, program: &[&str], environment: &BTreeMap<String, String>, output: &Path) -> Self {
        let log = File::options().create(true).append(true).open(output).unwrap();
        let mut command = Command::new("sh");
        for (key, _) in std::env::vars() {
            if ["BROADCASTD", "RABBITMQ_", "ERL_"].iter().any(|prefix| key.starts_with(prefix)) {
                command.env_remove(key);
            }
        }
        let mut child = command
            .args(["-c", WAIT_THEN_RUN, name])
            .args(program)
            .envs(environment)
            .current_dir(output.parent().unwrap())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        order("start", child.id());
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        Self { name: name.to_owned(), child, output: output.to_owned() }
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the whole group; nothing happens if it has ended.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        let _ = kill_process_group(pid, signal);
    }

    /// Kills it at once and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end; fails the test at the deadline.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.ended() {
                Some(status) => return status,
                None if start.elapsed() > deadline => {
                    panic!("{} still runs after {deadline:?}; it said:\n{}", self.name, self.output())
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// What it has written so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).unwrap_or_default()).into_owned()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
        order("end", self.child.id());
        if std::thread::panicking() {
            let output = self.output();
            let tail: Vec<&str> = output.lines().rev().take(60).collect();
            eprintln!("--- {}, its last lines:", self.name);
            tail.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
    }
}
