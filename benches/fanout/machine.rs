//! What the figures were measured on, and how CPU time is read.

use std::time::Duration;

/// Prints the machine and the versions, as the table's heading.
pub fn describe() {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("Machine: {} cores, {}, Linux {}", cores, model.trim_start_matches(['\t', ' ', ':']), kernel.trim());
    println!("Servers: {}; {}", version("redis-server", "--version"), rabbitmq());
    println!();
}

fn version(program: &str, argument: &str) -> String {
    let output = std::process::Command::new(program).arg(argument).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split(" sha=").next().unwrap_or_default().trim().to_owned()
}

fn rabbitmq() -> String {
    let apps = std::fs::read_dir("/usr/lib/rabbitmq/lib").into_iter().flatten().flatten();
    let name = apps.map(|entry| entry.file_name().to_string_lossy().into_owned()).next();
    name.unwrap_or_else(|| "RabbitMQ".to_owned())
}

/// CPU time that a process has used so far, user and system.
pub fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The command's name stands in brackets and may hold spaces; utime and stime are the 12th and 13th after it.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// The value below which `share` of the sorted values lie.
pub fn percentile(sorted: &[Duration], share: f64) -> Duration {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let index = ((sorted.len() as f64 * share) as usize).min(sorted.len() - 1);
    sorted[index]
}

/// Milliseconds or microseconds, with the digits that mean something.
pub fn show(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    if micros >= 10_000.0 {
        format!("{:.0} ms", micros / 1000.0)
    } else if micros >= 1000.0 {
        format!("{:.1} ms", micros / 1000.0)
    } else {
        format!("{micros:.0} µs")
    }
}
