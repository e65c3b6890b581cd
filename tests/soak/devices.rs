//! The devices: some stay, some come and go, some stop reading, some are new each time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::support::audit::Audit;
use crate::support::broadcastd::App;
use crate::support::device::{Device, Event};
use crate::support::now_ms;

/// How a device behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// Online all the time; comes back at once.
    Stays,
    /// Online for a while, away for a while; mostly back within the resume window.
    ComesAndGoes,
    /// Online, but its app does not read for a while now and then.
    StopsReading,
    /// A new installation each time.
    IsNew,
}

impl Habit {
    /// Of the `number`th device of an app.
    pub fn of(number: usize) -> Self {
        match number % 25 {
            0..11 => Self::Stays,
            11..18 => Self::ComesAndGoes,
            18..22 => Self::StopsReading,
            _ => Self::IsNew,
        }
    }
}

/// What all devices share.
#[derive(Debug, Clone)]
pub struct World {
    pub audit: Arc<Mutex<Audit>>,
    /// By the proxies.
    pub urls: Vec<String>,
    /// Without anything in between.
    pub direct_urls: Vec<String>,
    /// Empty while it goes on; then the last broadcast of each app, after which a device is done.
    pub ending: watch::Receiver<BTreeMap<String, u64>>,
}

/// One device of a habit, over the whole run, as one installation or as many.
pub struct Inhabitant {
    world: World,
    app: App,
    platform: &'static str,
    habit: Habit,
    rng: fastrand::Rng,
    device: Device,
    number: u64,
}

impl Inhabitant {
    pub fn new(world: &World, app: &App, platform: &'static str, habit: Habit, rng: fastrand::Rng) -> Self {
        let world = world.clone();
        let device = Device::new(app, platform);
        // What is direct and always read must not be late.
        let number = world.audit.lock().unwrap().device(&app.key, platform, habit == Habit::Stays);
        Self { world, app: app.clone(), platform, habit, rng, device, number }
    }

    /// Until it has had the last broadcast of its app.
    pub async fn live(mut self) {
        while self.last().is_none() {
            if self.login().await.is_err() {
                self.pause(50..1000).await;
                continue;
            }
            match self.habit {
                Habit::Stays => {
                    self.read(Duration::from_secs(3600)).await;
                }
                Habit::ComesAndGoes => {
                    let time = self.rng.u64(2000..25_000);
                    self.read(Duration::from_millis(time)).await;
                    self.device.drop_connection();
                    let long = self.rng.u32(0..10) == 0;
                    self.pause(if long { 61_000..90_000 } else { 100..40_000 }).await;
                }
                Habit::StopsReading => {
                    let time = self.rng.u64(1000..15_000);
                    if self.read(Duration::from_millis(time)).await {
                        continue;
                    }
                    self.pause(3_000..50_000).await;
                    // What has piled up; then perhaps a new connection.
                    if self.read(Duration::from_secs(5)).await {
                        continue;
                    }
                    if self.rng.bool() {
                        self.device.drop_connection();
                    }
                }
                Habit::IsNew => {
                    let time = self.rng.u64(2000..15_000);
                    self.read(Duration::from_millis(time)).await;
                    if self.last().is_none() {
                        self.pause(0..3000).await;
                        self.reinstall();
                    }
                }
            }
            self.pause(20..300).await;
        }
        while !self.is_done() {
            if self.login().await.is_err() {
                sleep(Duration::from_millis(200)).await;
                continue;
            }
            self.read(Duration::from_secs(1)).await;
        }
        self.device.drop_connection();
    }

    fn last(&self) -> Option<u64> {
        self.world.ending.borrow().get(&self.app.key).copied()
    }

    fn is_done(&self) -> bool {
        self.last().is_some_and(|last| self.device.cursor() >= last)
    }

    fn reinstall(&mut self) {
        self.device = Device::new(&self.app, self.platform);
        let mut audit = self.world.audit.lock().unwrap();
        audit.gone(self.number);
        self.number = audit.device(&self.app.key, self.platform, false);
    }

    /// Ended early by the end of the run.
    async fn pause(&mut self, ms: std::ops::Range<u64>) {
        let time = Duration::from_millis(self.rng.u64(ms));
        let mut ending = self.world.ending.clone();
        let _ = timeout(time, ending.wait_for(|ending| !ending.is_empty())).await;
    }

    async fn login(&mut self) -> Result<(), String> {
        if self.device.is_online() {
            return Ok(());
        }
        let urls = if self.habit == Habit::Stays || self.habit == Habit::StopsReading {
            &self.world.direct_urls
        } else {
            &self.world.urls
        };
        let url = urls[self.rng.usize(0..urls.len())].clone();
        let (since, asked_ms) = (self.device.cursor(), now_ms());
        timeout(Duration::from_secs(5), self.device.try_login(&url)).await.map_err(|_| "no answer")??;
        let (head, cursor) = (self.device.head(), self.device.cursor());
        self.world.audit.lock().unwrap().login(self.number, since, head, cursor, asked_ms, now_ms());
        Ok(())
    }

    /// Reads for so long, or until the connection or the run ends. Returns whether it ended.
    async fn read(&mut self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while self.device.is_online() && Instant::now() < until && (self.last().is_none() || !self.is_done()) {
            let event = self.device.next(until.min(Instant::now() + Duration::from_millis(500))).await;
            let mut audit = self.world.audit.lock().unwrap();
            match event {
                Some(Event::Broadcast(arrival)) => audit.arrival(self.number, &arrival, self.device.cursor()),
                Some(Event::Recall(id)) => audit.recall(self.number, id),
                Some(Event::Error(..) | Event::Closed(_)) | None => {}
            }
            drop(audit);
            self.device.forget();
        }
        !self.device.is_online()
    }
}

/// A new installation that comes when all is quiet: it is to get exactly what is retained.
pub async fn late_arrival(world: &World, app: &App, platform: &'static str) {
    let mut late = Inhabitant::new(world, app, platform, Habit::IsNew, fastrand::Rng::with_seed(1));
    while late.login().await.is_err() {
        sleep(Duration::from_millis(200)).await;
    }
    while late.device.is_online() && !late.is_done() {
        late.read(Duration::from_millis(300)).await;
    }
}
