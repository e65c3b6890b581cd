//! What a benchmark sees of the server: CPU time and memory, of a process here or by its metrics.

use std::time::Duration;

use anyhow::Context;

/// Where the server's figures come from.
#[derive(Debug, Clone)]
pub enum Server {
    /// A process of this machine, and its children.
    Process(u32),
    /// The admin address of a broadcastd process: `http://host:port`.
    Metrics(String),
    /// Nowhere.
    Unknown,
}

/// What it has used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// CPU time since its start, user and system.
    pub cpu: Duration,
    /// Memory of its own, bytes: resident, without what is mapped from files.
    pub memory: u64,
}

impl Server {
    /// The figures now; `None` if there are none.
    ///
    /// # Errors
    /// If the process or its admin address does not answer.
    pub fn usage(&self) -> anyhow::Result<Option<Usage>> {
        match self {
            Self::Process(pid) => process(*pid).map(Some),
            Self::Metrics(url) => metrics(url).map(Some),
            Self::Unknown => Ok(None),
        }
    }
}

/// Of a process, with all its threads, and its children.
fn process(pid: u32) -> anyhow::Result<Usage> {
    let what = || format!("process {pid} cannot be looked at");
    let mut usage = Usage::default();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).with_context(what)? {
        let task = task?.path();
        // Nanoseconds on a CPU; /proc/…/stat counts in hundredths of a second.
        let text = std::fs::read_to_string(task.join("schedstat")).with_context(what)?;
        let nanos = text.split(' ').next().and_then(|nanos| nanos.parse().ok()).with_context(what)?;
        usage.cpu += Duration::from_nanos(nanos);
        for child in std::fs::read_to_string(task.join("children")).unwrap_or_default().split_whitespace() {
            let child = process(child.parse()?)?;
            usage.cpu += child.cpu;
            usage.memory += child.memory;
        }
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(what)?;
    // Shared memory counts: nginx keeps its sessions there.
    for kind in ["RssAnon:", "RssShmem:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(kind)).with_context(what)?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(what)?;
        usage.memory += kib * 1024;
    }
    Ok(usage)
}

fn metrics(url: &str) -> anyhow::Result<Usage> {
    let url = format!("{}/metrics", url.trim_end_matches('/'));
    let text = super::super::call::agent()
        .get(&url)
        .call()
        .and_then(|mut response| response.body_mut().read_to_string())
        .with_context(|| format!("{url} does not answer"))?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<f64>().ok()).with_context(|| format!("{url} does not say {name}"))
    };
    let seconds = value("process_cpu_seconds_total")?.max(0.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bytes of memory")]
    let memory = value("process_resident_memory_bytes")?.max(0.0) as u64;
    Ok(Usage { cpu: Duration::from_secs_f64(seconds), memory })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_can_be_looked_at() {
        let before = process(std::process::id()).unwrap();
        let block = std::hint::black_box(vec![1_u8; 32 << 20]);
        let after = process(std::process::id()).unwrap();
        assert!(after.cpu > before.cpu && after.memory >= before.memory + (24 << 20), "{before:?} {after:?}");
        drop(block);
    }
}
