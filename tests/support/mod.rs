//! What the tests stand on: private servers, the built binary, devices, senders, and the checks of the fault table.

#![allow(dead_code, reason = "a toolbox: not every test module uses every tool")]

pub mod after_row;
pub mod audit;
pub mod broadcastd;
pub mod certificates;
pub mod checker;
pub mod clock;
pub mod device;
pub mod disk;
pub mod fleet;
pub mod guard;
pub mod journal;
pub mod load;
pub mod ports;
pub mod proxy;
pub mod rabbitmq;
pub mod redis;
pub mod resources;
pub mod sender;
pub mod sentinel;
pub mod stack;
pub mod stored;

use std::fmt::Display;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long anything that should happen "at once" may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

/// A name that no other test of this run has.
pub fn unique(stem: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{stem}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The time, milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    u64::try_from(now.as_millis()).expect("before the year 584 million")
}

/// Asks until the answer is there; fails the test at the deadline, with the last reason why not.
pub async fn until<T, E: Display>(what: &str, deadline: Duration, mut ask: impl AsyncFnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(why) if start.elapsed() > deadline => panic!("after {deadline:?}, still not {what}: {why}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(25)).await,
        }
    }
}

/// The same, where no runtime is at hand.
pub fn until_blocking<T, E: Display>(what: &str, deadline: Duration, mut ask: impl FnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(why) if start.elapsed() > deadline => panic!("after {deadline:?}, still not {what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}
