//! I5: what everything held over the run, first tenth against last tenth.

use std::collections::BTreeMap;

use tokio::task::block_in_place;

use super::installation::{Installation, PROCESSES};
use crate::support::resources::{BrokerUsage, RedisUsage, Usage, within};

const MIB: u64 = 1 << 20;

/// How far into the run, from 0 to 1, and how much.
type Series = Vec<(f64, u64)>;

/// Samples of everything, thinned out so that an hour takes no more than a minute.
#[derive(Debug, Default)]
pub struct Figures {
    series: BTreeMap<(String, &'static str), Series>,
    wrong: Vec<String>,
    most_kept: usize,
}

/// The most samples of one thing.
const MOST: usize = 2000;

impl Figures {
    /// Notes what is held now. What is being killed or frozen at the moment is left out.
    ///
    /// `kept`: what the checker keeps; `remembered`: request ids and signatures that are still remembered.
    pub fn sample(&mut self, at: f64, installation: &Installation, kept: usize, remembered: usize) {
        for name in PROCESSES {
            // While it is being killed its lock is held.
            let Ok(process) = installation.process(name).try_lock() else { continue };
            if let Ok(usage) = Usage::of(process.pid()) {
                self.note(at, name, "RSS", usage.rss_bytes);
                self.note(at, name, "descriptors", usage.descriptors);
                self.note(at, name, "threads", usage.threads);
            }
        }
        if let Ok(usage) = Usage::of(std::process::id()) {
            self.note(at, "soak itself", "RSS", usage.rss_bytes);
        }
        if let Ok(redis) = installation.redis.try_lock() {
            let usage = block_in_place(|| RedisUsage::of(&redis));
            // Stated: a key for each request accepted and each call signed within its time (a tenth more, for what Redis has not
            // removed yet), and log, retained, meta, nodes and two rates of each app.
            let most = remembered as u64 * 11 / 10 + 6 * 3 + 100;
            if usage.keys > most {
                self.wrong.push(format!("I5: {} keys in Redis, at most {most} are accounted for", usage.keys));
            }
            self.note(at, "redis", "keys", usage.keys);
            self.note(at, "redis", "memory", usage.used_memory);
            self.note(at, "redis", "clients", usage.clients);
        }
        if let Ok(rabbitmq) = installation.rabbitmq.try_lock()
            && let Ok(usage) = block_in_place(|| BrokerUsage::of(&rabbitmq, &installation.vhost))
        {
            self.note(at, "rabbitmq", "connections", usage.connections);
            self.note(at, "rabbitmq", "queues", usage.queues);
        }
        self.most_kept = self.most_kept.max(kept);
    }

    fn note(&mut self, at: f64, what: &str, of: &'static str, value: u64) {
        let series = self.series.entry((what.to_owned(), of)).or_default();
        series.push((at, value));
        if series.len() > MOST {
            let mut number = 0;
            series.retain(|_| {
                number += 1;
                number % 2 == 0
            });
        }
    }

    /// Resident memory of the product's processes together, as of the last samples, MiB.
    pub fn rss_mib(&self) -> u64 {
        let last = |name: &str| self.series.get(&(name.to_owned(), "RSS")).and_then(|series| series.last());
        PROCESSES.iter().filter_map(|name| last(name)).map(|(_, bytes)| bytes / MIB).sum()
    }

    /// A line each, and what is out of bounds.
    pub fn report(mut self, began_empty: bool) -> (Vec<String>, Vec<String>) {
        let mut lines = Vec::new();
        for ((what, of), series) in &self.series {
            let mean = |from: f64, to: f64| {
                let values: Vec<u64> =
                    series.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, value)| *value).collect();
                (!values.is_empty()).then(|| values.iter().sum::<u64>() / values.len() as u64)
            };
            // Where nothing could be sampled in a tenth (it was down all the time), what is nearest.
            let first = mean(0.0, 0.1).unwrap_or(series[0].1);
            let last = mean(0.9, 2.0).unwrap_or(series[series.len() - 1].1);
            let allowed = match *of {
                // It remembers ten minutes; what it keeps is counted below.
                "RSS" if what == "soak itself" => Some(256 * MIB),
                "RSS" => Some(first / 2 + 16 * MIB),
                // Connections of devices that come and go, and those that a restarted role builds.
                "descriptors" => Some(60),
                "threads" => Some(4),
                "clients" | "connections" => Some(12),
                "queues" => Some(2),
                // Until dedupe keys and logs are as many as they will be, memory grows with them; keys have a bound of their own.
                "memory" if began_empty => Some(32 * MIB),
                "memory" => Some(first / 2 + 8 * MIB),
                _ => None,
            };
            let text = |value: u64| {
                if matches!(*of, "RSS" | "memory") {
                    format!("{:.1} MiB", value as f64 / MIB as f64)
                } else {
                    value.to_string()
                }
            };
            let verdict = match allowed.map(|allowed| within(of, first, last, allowed)) {
                Some(Err(sentence)) => {
                    self.wrong.push(format!("{what}: {sentence}"));
                    "TOO MUCH".to_owned()
                }
                Some(Ok(())) => format!("at most {} more", text(allowed.unwrap_or(0))),
                None => "bounded by what was accepted and signed".to_owned(),
            };
            lines.push(format!(
                "{of:<12} {what:<12} first tenth {:>10}  last tenth {:>10}  ({verdict})",
                text(first),
                text(last)
            ));
        }
        lines.push(format!("the checker kept {} entries, requests and steps at the most", self.most_kept));
        (lines, self.wrong)
    }
}
