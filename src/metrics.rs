//! Every figure that is exported, in one struct; the help text is the doc comment. Handles are taken once, off the hot path.

use prometheus::core::Collector;
use prometheus::{
    Counter, Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Seconds, from 100 µs to 60 s.
const SECONDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

macro_rules! metrics {
    ($( #[doc = $help:literal] $field:ident : $kind:ident = $name:literal $(, [$($label:literal),+])? ;)+) => {
        /// All metrics of a process. A role that does not use one leaves it at zero.
        #[derive(Debug, Clone)]
        pub struct Metrics {
            registry: Registry,
            process: Process,
            $( #[doc = $help] pub $field: $kind, )+
        }

        /// Name and help of every metric, for the documentation and its test.
        pub const CATALOGUE: &[(&str, &str)] = &[ $( ($name, $help) ),+ ];

        impl Metrics {
            /// Makes and registers all of them.
            ///
            /// # Errors
            /// If two had one name: a mistake in this file.
            pub fn new() -> Result<Self, prometheus::Error> {
                let registry = Registry::new();
                let process = Process::new(&registry)?;
                $( let $field = metrics!(@make $kind, $name, $help $(, [$($label),+])?)?;
                   register(&registry, &$field)?; )+
                Ok(Self { registry, process, $($field),+ })
            }
        }
    };
    (@make IntCounter, $name:literal, $help:literal) => { IntCounter::new($name, $help.trim()) };
    (@make IntGauge, $name:literal, $help:literal) => { IntGauge::new($name, $help.trim()) };
    (@make Histogram, $name:literal, $help:literal) => {
        Histogram::with_opts(HistogramOpts::new($name, $help.trim()).buckets(SECONDS.to_vec()))
    };
    (@make HistogramVec, $name:literal, $help:literal, [$($label:literal),+]) => {
        HistogramVec::new(HistogramOpts::new($name, $help.trim()).buckets(SECONDS.to_vec()), &[$($label),+])
    };
    (@make IntCounterVec, $name:literal, $help:literal, [$($label:literal),+]) => {
        IntCounterVec::new(Opts::new($name, $help.trim()), &[$($label),+])
    };
    (@make IntGaugeVec, $name:literal, $help:literal, [$($label:literal),+]) => {
        IntGaugeVec::new(Opts::new($name, $help.trim()), &[$($label),+])
    };
}

metrics! {
    /// Always 1; the labels say what is running.
    build_info: IntGaugeVec = "broadcastd_build_info", ["version", "role"];
    /// 1 while a dependency answers, else 0.
    ready: IntGaugeVec = "broadcastd_ready", ["dependency"];

    /// Requests taken from the queue.
    consumed: IntCounter = "broadcastd_consumed_total";
    /// Requests that became a broadcast.
    accepted: IntCounter = "broadcastd_accepted_total";
    /// Requests whose id had been accepted before; nothing was sent again.
    repeated: IntCounter = "broadcastd_repeated_total";
    /// Requests refused or rejected, by reason.
    refused: IntCounterVec = "broadcastd_refused_total", ["reason"];
    /// Requests put on the dead-letter queue, by reason.
    dead_lettered: IntCounterVec = "broadcastd_dead_lettered_total", ["reason"];
    /// Times that dead letters could not be stored; their requests are held and it is tried again.
    dead_letter_failures: IntCounter = "broadcastd_dead_letter_failures_total";
    /// Requests set aside because they had been delivered again and again; they are decided one at a time.
    suspects: IntCounter = "broadcastd_suspects_total";
    /// Requests held unacknowledged because the ledger does not answer.
    held: IntGauge = "broadcastd_requests_held";
    /// Ledger calls that were tried again.
    ledger_retries: IntCounter = "broadcastd_ledger_retries_total";
    /// Replies that were confirmed by the broker.
    replies: IntCounter = "broadcastd_replies_total";
    /// Replies that could not be delivered, by reason.
    replies_lost: IntCounterVec = "broadcastd_replies_lost_total", ["reason"];
    /// Connections that the worker opened for replies.
    reply_connections: IntCounter = "broadcastd_reply_connections_total";
    /// Times that the worker rebuilt its session with the broker.
    worker_sessions: IntCounter = "broadcastd_worker_sessions_total";
    /// Seconds that the ledger took to decide a batch of requests.
    accept_seconds: Histogram = "broadcastd_accept_seconds";
    /// Seconds from enqueuing (the sender's clock) to acceptance (the worker's), for requests that carry a timestamp.
    queue_age_seconds: Histogram = "broadcastd_queue_age_seconds";
    /// Nodes that held a lease when a broadcast was accepted, summed up.
    nodes_targeted: IntCounter = "broadcastd_nodes_targeted_total";
    /// Nodes that were subscribed, of those targeted, summed up.
    nodes_reached: IntCounter = "broadcastd_nodes_reached_total";

    /// Envelopes that the node received by its subscription.
    envelopes: IntCounter = "broadcastd_envelopes_total";
    /// Envelopes that could not be read, or only by a newer version, and were skipped.
    envelopes_unreadable: IntCounter = "broadcastd_envelopes_unreadable_total";
    /// Times that the node read the log because something was missing.
    backfills: IntCounter = "broadcastd_backfills_total";
    /// Broadcasts that were gone from the log before the node could read them, as far as it can tell (at least this many).
    lost_envelopes: IntCounter = "broadcastd_lost_envelopes_total";
    /// Retained broadcasts that the node wrote back after the ledger had lost them.
    restored: IntCounter = "broadcastd_restored_total";
    /// Apps that the node holds a lease for.
    apps: IntGauge = "broadcastd_apps";
    /// Connections accepted.
    connections: IntCounter = "broadcastd_connections_total";
    /// Connections turned away before login, by reason.
    connections_refused: IntCounterVec = "broadcastd_connections_refused_total", ["reason"];
    /// Devices logged in.
    sessions: IntGauge = "broadcastd_sessions";
    /// Logins that succeeded.
    logins: IntCounter = "broadcastd_logins_total";
    /// Sessions closed, by reason.
    sessions_closed: IntCounterVec = "broadcastd_sessions_closed_total", ["reason"];
    /// Frames handed to the kernel whole, one a device and broadcast.
    deliveries: IntCounter = "broadcastd_deliveries_total";
    /// Sessions that could not take a frame at once and wait to be writable.
    sessions_behind: IntGauge = "broadcastd_sessions_behind";
    /// Sessions closed because they were further behind than the recent window; they resume by cursor.
    evicted: IntCounter = "broadcastd_sessions_evicted_total";
    /// Devices that came back soon, but after more had been broadcast than the recent window holds: some of it they never get.
    resumes_short: IntCounter = "broadcastd_resumes_short_total";
    /// Seconds from acceptance (the ledger's clock) until the last writable socket had it (the node's clock).
    delivery_seconds: Histogram = "broadcastd_delivery_seconds";
    /// Seconds that one sweep over the sessions of an app took.
    sweep_seconds: Histogram = "broadcastd_sweep_seconds";

    /// Server API calls, by call and answered code.
    api_calls: IntCounterVec = "broadcastd_api_calls_total", ["call", "code"];
    /// Seconds that a server API call took.
    api_seconds: HistogramVec = "broadcastd_api_seconds", ["call"];
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: &C) -> Result<(), prometheus::Error> {
    registry.register(Box::new(collector.clone()))
}

/// What every Prometheus client exports, under the usual names. The library's own collector counts whole seconds only.
#[derive(Debug, Clone)]
struct Process {
    cpu: Counter,
    memory: IntGauge,
    descriptors: IntGauge,
}

impl Process {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let cpu = Counter::new("process_cpu_seconds_total", "CPU time used, user and system, seconds.")?;
        let memory = IntGauge::new("process_resident_memory_bytes", "Resident memory, bytes.")?;
        let descriptors = IntGauge::new("process_open_fds", "Open file descriptors.")?;
        register(registry, &cpu)?;
        register(registry, &memory)?;
        register(registry, &descriptors)?;
        Ok(Self { cpu, memory, descriptors })
    }

    fn look(&self) {
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        #[allow(clippy::cast_precision_loss, reason = "seconds of CPU time")]
        let seconds = used.tv_sec as f64 + used.tv_nsec as f64 / 1e9;
        self.cpu.reset();
        self.cpu.inc_by(seconds);
        // The second number is resident pages; elsewhere than on Linux there is no such file, and both stay 0.
        let pages = std::fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|text| text.split(' ').nth(1)?.parse::<i64>().ok());
        let page = i64::try_from(rustix::param::page_size()).unwrap_or(4096);
        self.memory.set(pages.unwrap_or(0) * page);
        self.descriptors.set(std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as i64));
    }
}

impl Metrics {
    /// The text format that Prometheus reads.
    ///
    /// # Errors
    /// If a metric cannot be written: never seen.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        self.process.look();
        let mut buffer = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut buffer)?;
        String::from_utf8(buffer).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_convention_and_are_exported() {
        let metrics = Metrics::new().unwrap();
        metrics.build_info.with_label_values(&["0", "test"]).set(1);
        let text = metrics.text().unwrap();
        assert!(text.contains("broadcastd_build_info{"));
        let cpu = text.lines().find_map(|line| line.strip_prefix("process_cpu_seconds_total ")).unwrap();
        assert!(cpu.parse::<f64>().unwrap() > 0.0);
        assert!(text.contains("# HELP broadcastd_accepted_total Requests that became a broadcast."));
        for (name, help) in CATALOGUE {
            assert!(name.starts_with("broadcastd_") && help.trim().ends_with('.'), "{name}");
        }
    }
}
