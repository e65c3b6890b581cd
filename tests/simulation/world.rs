//! One history: its steps, drawn from the seed, and the oracle.

use broadcastd::broadcast::BroadcastId;
use broadcastd::broadcast::platform::Platform;
use broadcastd::broadcast::quota::Limits;
use broadcastd::fuzzing::Bounds;
use fastrand::Rng;

use super::Counts;
use super::device::{Device, Link, Stream, Told};
use super::ledger::{Fact, Ledger};
use super::node::{Node, RESUME_MS};

const NODES: usize = 2;
const DEVICES: usize = 6;
const SECOND: u64 = 1_000_000;

pub struct World {
    random: Rng,
    trace: bool,
    now_us: u64,
    /// The time in milliseconds at each moment, a moment being a step.
    times: Vec<u64>,
    ledger: Ledger,
    bounds: Bounds,
    nodes: Vec<Node>,
    devices: Vec<Device>,
    /// Whether what is published always arrives, once and in order.
    is_calm: bool,
    /// Out of ten broadcasts, so many are retained.
    retained: u8,
    counts: Counts,
}

impl World {
    pub fn new(seed: u64, trace: bool) -> Self {
        let mut random = Rng::with_seed(seed);
        let pick = |random: &mut Rng, values: &[usize]| values[random.usize(..values.len())];
        let limits = Limits {
            per_minute: pick(&mut random, &[3, 10, 100_000, 100_000]) as u32,
            per_day: pick(&mut random, &[20, 100_000, 100_000]) as u32,
        };
        let ledger = Ledger::new(pick(&mut random, &[4, 12, 40, 1000]), limits);
        let bounds =
            Bounds { frames: pick(&mut random, &[4, 8, 32, 1024]), bytes: pick(&mut random, &[700, 1 << 20, 1 << 20]) };
        let device = |at: usize| Device::new(Platform::ALL[at % 5]);
        Self {
            trace,
            now_us: 1_764_000_000 * SECOND + random.u64(..86_400 * SECOND),
            times: vec![0],
            ledger,
            bounds,
            nodes: (0..NODES).map(|_| Node::new(bounds)).collect(),
            devices: (0..DEVICES).map(device).collect(),
            is_calm: random.u8(..4) == 0,
            retained: [1, 5, 9][random.usize(..3)],
            counts: Counts::new(),
            random,
        }
    }

    pub fn play(mut self) -> Counts {
        // Some are long enough for more than a hundred retained ones.
        let mut steps = self.random.usize(20..400);
        if self.random.u8(..100) == 0 {
            steps = 1500;
            self.retained = 10;
            self.ledger.limits = Limits { per_minute: 100_000, per_day: 100_000 };
        }
        for _ in 0..steps {
            self.step();
            self.after_step();
        }
        // Nothing more may come that would make up for it.
        if self.random.u8(..8) == 0 {
            self.restart_ledger();
        }
        self.heal();
        self.judge();
        self.counts
    }

    fn count(&mut self, kind: &'static str) {
        *self.counts.entry(kind).or_default() += 1;
    }

    fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{} {}", self.times.len(), text());
        }
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1000
    }

    fn moment(&self) -> u64 {
        self.times.len() as u64
    }

    fn step(&mut self) {
        let node = self.random.usize(..NODES);
        let shard = self.random.usize(..2);
        let device = self.random.usize(..DEVICES);
        match self.random.u8(..100) {
            0..16 => self.accept(),
            16..18 => self.recall(),
            18..34 => self.take_published(node),
            34..46 => self.progress(node),
            46..58 => self.nodes[node].take_message(shard, self.now_us / 1000, self.times.len() as u64),
            58..68 => self.sweep(node, shard),
            68..80 => {
                let most = if self.random.bool() { usize::MAX } else { self.random.usize(1..200) };
                self.read(device, most);
            }
            80..86 => self.connect(device, node, shard),
            86..88 => self.disconnect(device),
            88..91 => {
                self.note(|| format!("node {node} renews"));
                self.nodes[node].renew(&self.ledger);
            }
            91..97 => {
                let most = [1, 5, 40, 61, 3600][self.random.usize(..5)] * SECOND;
                self.now_us += self.random.u64(..=most);
                self.count("clock moved");
            }
            97 => {
                if let Some(Link { node, shard, key, .. }) = self.devices[device].link {
                    let (now_ms, moment) = (self.now_ms(), self.moment());
                    self.nodes[node].ping(shard, key, now_ms, moment);
                    self.count("ping between frames");
                }
            }
            98 => match self.random.u8(..4) {
                0 => self.restart_node(node),
                1 => {
                    self.disconnect(device);
                    self.devices[device] = Device::new(self.devices[device].platform);
                    self.count("device reinstalled");
                }
                _ => {}
            },
            _ => {
                if self.random.u8(..4) == 0 {
                    self.restart_ledger();
                }
            }
        }
    }

    fn accept(&mut self) {
        let now_us = self.now_us;
        let ttl_ms = (self.random.u8(..10) < self.retained)
            .then(|| [1000, 30_000, 600_000, 7 * 86_400_000][self.random.usize(..4)] + self.random.u64(..1000));
        let ttl_ms = if self.retained == 10 { Some(7 * 86_400_000) } else { ttl_ms };
        let body =
            "b".repeat(if self.random.u8(..8) == 0 { self.random.usize(200..400) } else { self.random.usize(1..60) });
        let mut platforms: Vec<&str> = Platform::ALL.iter().map(|platform| platform.name()).collect();
        if self.random.u8(..3) == 0 {
            platforms = vec![platforms[self.random.usize(..5)], platforms[self.random.usize(..5)]];
        }
        let before = self.ledger.retained(now_us).len();
        let Some(raw) = self.ledger.accept(now_us, ttl_ms, body, platforms) else {
            return self.count("refused by the quota");
        };
        self.count("accepted");
        if before == 100 {
            self.count("hundred retained");
        }
        self.note(|| format!("accepted {}", String::from_utf8_lossy(&raw)));
        self.publish(&raw);
        // Two in the same microsecond are possible, and their ids differ all the same.
        self.now_us += self.random.u64(..2000);
    }

    fn recall(&mut self) {
        let ids: Vec<BroadcastId> = self.ledger.facts.keys().rev().take(20).copied().collect();
        if ids.is_empty() {
            return;
        }
        let target = ids[self.random.usize(..ids.len())];
        let Some(raw) = self.ledger.recall(self.now_us, target) else { return };
        self.count("recalled");
        self.note(|| format!("recalled {target}: {}", self.ledger.head()));
        self.publish(&raw);
    }

    fn publish(&mut self, raw: &std::sync::Arc<[u8]>) {
        for at in 0..NODES {
            let fate = if self.is_calm { 99 } else { self.random.u8(..100) };
            let feed = &mut self.nodes[at].feed;
            match fate {
                0..15 => self.count("published, lost"),
                15..23 => {
                    feed.push_back(raw.clone());
                    feed.push_back(raw.clone());
                    self.count("published, doubled");
                }
                23..31 => {
                    let place = self.random.usize(..=feed.len());
                    feed.insert(place, raw.clone());
                    self.count("published, reordered");
                }
                _ => feed.push_back(raw.clone()),
            }
        }
    }

    fn take_published(&mut self, node: usize) {
        let now_ms = self.now_ms();
        if let Some(kind) = self.nodes[node].take_published(0, now_ms) {
            self.count(kind);
            self.note(|| format!("node {node}: {kind}, last {}", self.nodes[node].app.last()));
        }
    }

    fn progress(&mut self, node: usize) {
        let fails = self.random.u8(..8) == 0;
        self.progress_unless(node, fails);
    }

    fn progress_unless(&mut self, node: usize, fails: bool) {
        let before = self.nodes[node].lost.len();
        let restored = self.nodes[node].restored;
        if let Some(kind) = self.nodes[node].progress(&mut self.ledger, self.now_us, fails) {
            self.count(kind);
            self.note(|| format!("node {node}: {kind}, last {}", self.nodes[node].app.last()));
        }
        if self.nodes[node].lost.len() > before {
            self.count("lost and said so");
        }
        if self.nodes[node].restored > restored {
            self.count("written back");
        }
    }

    fn sweep(&mut self, node: usize, shard: usize) {
        let mut keys: Vec<u64> = self.nodes[node].shards[shard].seats.keys().copied().collect();
        self.random.shuffle(&mut keys);
        let (now_ms, moment) = (self.now_ms(), self.moment());
        self.nodes[node].sweep(shard, &keys, now_ms, moment);
    }

    fn connect(&mut self, device: usize, node: usize, shard: usize) {
        if self.devices[device].link.is_some() {
            return;
        }
        let capacity = [80, 300, 1 << 16][self.random.usize(..3)];
        let stream = Stream::new(capacity, self.random.u64(..));
        let (since, platform) = (self.devices[device].cursor, self.devices[device].platform);
        self.note(|| format!("device {device} connects to {node}/{shard} since {since}"));
        let (now_ms, moment) = (self.now_ms(), self.moment());
        let (key, begun) = self.nodes[node].log_in(shard, stream.clone(), since, platform, now_ms, moment);
        self.count(if since == 0 { "login of a new device" } else { "login with a cursor" });
        if begun.get().is_none() {
            self.count("waited for its timeline");
        }
        self.devices[device].link = Some(Link::new(node, shard, key, stream, begun));
    }

    fn disconnect(&mut self, device: usize) {
        if self.devices[device].link.is_none() {
            return;
        }
        let most = self.random.usize(..400);
        self.read(device, most);
        if let Some(Link { node, shard, key, .. }) = self.devices[device].link.take() {
            self.note(|| format!("device {device} leaves"));
            self.nodes[node].shards[shard].seats.remove(&key);
            self.count("device left");
        }
    }

    fn restart_node(&mut self, node: usize) {
        for device in 0..DEVICES {
            if self.devices[device].link.as_ref().is_some_and(|link| link.node == node) {
                self.disconnect(device);
            }
        }
        self.note(|| format!("node {node} restarts"));
        self.nodes[node] = Node::new(self.bounds);
        self.count("node restarted");
    }

    fn restart_ledger(&mut self) {
        // That takes longer than all broadcasts before it took, a microsecond each at the least.
        self.now_us += SECOND;
        let most = self.random.usize(..4);
        let lost = self.ledger.restart(most);
        self.note(|| format!("ledger restarts, {lost} changes lost, head {}", self.ledger.head()));
        self.count("ledger restarted");
        if lost > 0 {
            self.count("ledger lost its tail");
        }
    }

    /// What follows from a step at once: devices that were sent away, and what those that were welcomed must get.
    fn after_step(&mut self) {
        for device in 0..DEVICES {
            let Some(Link { node, key, .. }) = self.devices[device].link else { continue };
            if self.nodes[node].evicted.contains(&key) {
                self.read(device, usize::MAX);
                self.devices[device].link = None;
                self.note(|| format!("device {device} was too far behind"));
                self.count("evicted");
            } else {
                self.promise(device);
                if self.times.len().is_multiple_of(4) {
                    self.check_settled(device);
                }
            }
        }
        self.nodes.iter_mut().for_each(|node| node.evicted.clear());
        if self.ledger.has_trimmed {
            self.counts.entry("log trimmed").or_insert(1);
        }
        self.times.push(self.now_us / 1000);
    }

    fn is_for(fact: &Fact, platform: Platform) -> bool {
        fact.platforms.contains(&platform.name())
    }

    /// Notes what a device that has just been welcomed must get of what came before.
    fn promise(&mut self, device: usize) {
        let platform = self.devices[device].platform;
        let Some(link) = &self.devices[device].link else { return };
        let (None, Some(begin)) = (&link.due, link.begun.get()) else { return };
        let shard = &self.nodes[link.node].shards[link.shard];
        let retained = self.ledger.retained(self.now_us);
        let oldest = begin.login_ms.saturating_sub(RESUME_MS);
        let mut due = Vec::new();
        let mut kinds = Vec::new();
        for (id, fact) in &self.ledger.facts {
            if *id <= begin.since || *id > begin.login_head || fact.is_recalled || fact.is_lost {
                continue;
            }
            if fact.expires_ms != 0 && fact.expires_ms <= begin.login_ms {
                kinds.push("retained expired");
            }
            if !Self::is_for(fact, platform) {
                continue;
            }
            if retained.contains(id) {
                due.push(*id);
            } else if begin.since > 0 && fact.expires_ms == 0 && fact.recalls.is_none() {
                if fact.time_ms <= oldest {
                    kinds.push("came back too late");
                } else if self.is_recent(&shard.told, *id) {
                    due.push(*id);
                    kinds.push("resumed within the window");
                }
            }
        }
        kinds.into_iter().for_each(|kind| self.count(kind));
        self.note(|| format!("device {device} is due {due:?} of {begin:?}"));
        if let Some(link) = &mut self.devices[device].link {
            link.due = Some(due);
        }
    }

    /// Whether an entry is surely still within the recent window of a shard that was told these.
    fn is_recent(&self, told: &[BroadcastId], id: BroadcastId) -> bool {
        let Ok(at) = told.binary_search(&id) else { return false };
        let after = &told[at..];
        let bytes: usize = after.iter().map(|id| self.ledger.facts[id].bytes).sum();
        after.len() <= self.bounds.frames && bytes <= self.bounds.bytes
    }

    fn read(&mut self, device: usize, most: usize) {
        let Some(link) = &mut self.devices[device].link else { return };
        let (node, shard, key) = (link.node, link.shard, link.key);
        for (told, moment) in link.read(most) {
            self.check(device, &told, moment);
            self.devices[device].advance(&told);
        }
        let seat = self.nodes[node].shards[shard].seats.get(&key);
        if seat.is_some_and(|seat| seat.session.is_behind) {
            self.count("fell behind");
            // Now it is writable.
            let (now_ms, moment) = (self.now_ms(), self.moment());
            self.nodes[node].flush(shard, key, now_ms, moment);
        }
    }

    /// What a device is told must be so, and must be told now and not before.
    fn check(&mut self, device: usize, told: &Told, moment: u64) {
        self.note(|| format!("device {device} reads {told:?}, written at {moment}"));
        let link = self.devices[device].link.as_ref().expect("it reads");
        let begin = link.begun.get().expect("nothing is sent before the welcome");
        let shard = &self.nodes[link.node].shards[link.shard];
        match told {
            Told::Welcome { head, .. } => assert_eq!(*head, begin.login_head.max(1)),
            Told::Recall { id } => {
                assert!(shard.recalled.contains_key(id));
                self.count("recall received");
            }
            Told::Broadcast { id, time_ms, content } => {
                let fact = self.ledger.facts.get(id).expect("it was accepted");
                assert_eq!((content, *time_ms), (&fact.body, fact.time_ms), "{id}: what was accepted");
                let written_ms = self.times.get(moment as usize).copied().unwrap_or(self.now_us / 1000);
                let last = self.devices[device].history.last().copied().unwrap_or(0);
                assert!(*id > last && *id > begin.since, "{id} after {last}: twice, or out of order");
                assert!(Self::is_for(fact, self.devices[device].platform), "{id} is not for this platform");
                assert!(fact.expires_ms == 0 || fact.expires_ms > written_ms, "{id} has expired");
                let recalled = shard.recalled.get(id).is_some_and(|at| *at < moment);
                assert!(!recalled || fact.is_lost || self.ledger.may_forget_recalls(), "{id} had been deleted");
                if *id <= begin.login_head && fact.expires_ms == 0 {
                    assert!(begin.since > 0, "{id} was for those who were online, and this is a new device");
                    assert!(fact.time_ms > begin.login_ms - RESUME_MS, "{id} was too long ago for one that comes back");
                }
                self.count("broadcast received");
            }
        }
    }

    /// A session that has been sent everything has everything.
    fn check_settled(&mut self, device: usize) -> bool {
        let (now_ms, platform) = (self.now_ms(), self.devices[device].platform);
        let history = &self.devices[device].history;
        let Some(link) = &self.devices[device].link else { return false };
        let shard = &self.nodes[link.node].shards[link.shard];
        let (Some(seat), Some(begin), Some(due)) = (shard.seats.get(&link.key), link.begun.get(), &link.due) else {
            return false;
        };
        let has_had_all = shard.last().is_some_and(|last| seat.session.cursor >= last);
        if !has_had_all || seat.session.is_behind || !link.is_read() {
            return false;
        }
        let mut others = 0;
        let live = shard.told[shard.told.partition_point(|id| *id <= begin.login_head)..].iter();
        for id in due.iter().chain(live) {
            let fact = &self.ledger.facts[id];
            if let Some(target) = fact.recalls {
                assert!(
                    self.devices[device].hidden.contains(&target),
                    "device {device} was not told of the recall {id}"
                );
                continue;
            }
            let is_valid = fact.expires_ms == 0 || fact.expires_ms > now_ms;
            if !Self::is_for(fact, platform) {
                others += 1;
            } else if is_valid && !fact.is_recalled && history.binary_search(id).is_err() {
                // A hundred newer ones have pushed it out while the device took its time, or had before the ledger lost one
                // of them.
                let retained = self.ledger.retained(self.now_us);
                let is_full = self.ledger.has_lost && retained.len() == 100;
                let is_pushed_out =
                    *id <= begin.login_head && fact.expires_ms != 0 && (is_full || !retained.contains(id));
                assert!(is_pushed_out, "device {device} has not had {id}");
            }
        }
        if others > 0 {
            self.count("not for the platform");
        }
        true
    }

    /// All faults end: everybody reads what there is.
    fn heal(&mut self) {
        self.note(|| "all faults end".to_owned());
        for round in 0.. {
            assert!(round < 300, "it does not come to rest");
            for node in 0..NODES {
                while !self.nodes[node].feed.is_empty() {
                    self.take_published(node);
                }
                self.progress_unless(node, false);
                self.nodes[node].renew(&self.ledger);
                for shard in 0..2 {
                    for _ in 0..self.random.usize(1..4) {
                        let (now_ms, moment) = (self.now_ms(), self.moment());
                        self.nodes[node].take_message(shard, now_ms, moment);
                    }
                    self.sweep(node, shard);
                }
            }
            for device in 0..DEVICES {
                self.connect(device, device % NODES, device / 3);
                self.read(device, usize::MAX);
            }
            self.after_step();
            let is_level = |node: &Node| {
                node.is_idle()
                    && node.app.last() == self.ledger.head()
                    && node.app.generation.as_ref() == Some(&self.ledger.generation())
            };
            if self.nodes.iter().all(is_level) && (0..DEVICES).all(|device| self.check_settled(device)) {
                return;
            }
        }
    }

    /// The end, when nothing is under way: what the ledger has is what everybody has.
    fn judge(&mut self) {
        let retained = self.ledger.retained(self.now_us);
        for (at, node) in self.nodes.iter().enumerate() {
            let told = &node.shards[0].told;
            for (id, fact) in &self.ledger.facts {
                let is_due = told.first().is_some_and(|first| id >= first) && !fact.is_recalled && !fact.is_lost;
                assert!(
                    !is_due || told.binary_search(id).is_ok() || node.lost.contains(id),
                    "node {at} has passed over {id}"
                );
            }
            for shard in &node.shards {
                let ids = shard.retained(self.now_us / 1000);
                if !self.ledger.has_lost && !self.ledger.may_forget_recalls() {
                    assert_eq!(ids, retained, "node {at} retains what the ledger retains");
                }
                assert!(ids.len() <= 100);
            }
        }
        for (at, device) in self.devices.iter().enumerate() {
            for id in &retained {
                let fact = &self.ledger.facts[id];
                let is_sure = !(fact.is_lost || fact.is_recalled && self.ledger.may_forget_recalls());
                if Self::is_for(fact, device.platform) && is_sure {
                    assert!(
                        device.history.binary_search(id).is_ok(),
                        "device {at} has not had {id}, which is retained"
                    );
                }
            }
            assert!(device.history.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
