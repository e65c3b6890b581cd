//! Faults of the table, drawn by a seeded generator: one at a time or two that overlap, then calm.

use std::fmt;
use std::time::Duration;

use tokio::task::block_in_place;
use tokio::time::sleep;

use super::installation::{Installation, PROCESSES};
use crate::support::proxy::Weather;

/// One thing that goes wrong, and for how long.
#[derive(Debug, Clone)]
pub enum Fault {
    Kill(&'static str, Duration),
    Drain(&'static str, Duration),
    Stop(&'static str, Duration),
    RedisKill(Duration),
    RedisFreeze(Duration),
    RedisFull(Duration),
    RedisClients(&'static str),
    ScriptFlush,
    BrokerRestart(Duration),
    BrokerKill(Duration),
    BrokerFreeze(Duration),
    BrokerAlarm(Duration),
    BrokerConnections,
    Weather(String, Weather, Duration),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(who, pause) => write!(f, "kill -9 {who}, again after {pause:?}"),
            Self::Drain(who, pause) => write!(f, "SIGTERM {who}, again after {pause:?}"),
            Self::Stop(who, time) => write!(f, "SIGSTOP {who} for {time:?}"),
            Self::RedisKill(pause) => write!(f, "kill -9 redis, again after {pause:?}"),
            Self::RedisFreeze(time) => write!(f, "SIGSTOP redis for {time:?}"),
            Self::RedisFull(time) => write!(f, "redis out of memory for {time:?}"),
            Self::RedisClients(kind) => write!(f, "redis: CLIENT KILL TYPE {kind}"),
            Self::ScriptFlush => write!(f, "redis: SCRIPT FLUSH"),
            Self::BrokerRestart(pause) => write!(f, "stop rabbitmq, again after {pause:?}"),
            Self::BrokerKill(pause) => write!(f, "kill -9 rabbitmq, again after {pause:?}"),
            Self::BrokerFreeze(time) => write!(f, "SIGSTOP rabbitmq for {time:?}"),
            Self::BrokerAlarm(time) => write!(f, "rabbitmq: memory alarm for {time:?}"),
            Self::BrokerConnections => write!(f, "rabbitmq: close all connections"),
            Self::Weather(link, weather, time) => write!(f, "{link}: {weather:?} for {time:?}"),
        }
    }
}

impl Fault {
    /// Draws one whose description has none of these words in it.
    pub fn draw(rng: &mut fastrand::Rng, installation: &Installation, without: &[String]) -> Self {
        loop {
            let fault = Self::any(rng, installation);
            let text = fault.to_string();
            if !without.iter().any(|word| text.contains(word)) {
                return fault;
            }
        }
    }

    fn any(rng: &mut fastrand::Rng, installation: &Installation) -> Self {
        let seconds = |rng: &mut fastrand::Rng, most: u64| Duration::from_millis(rng.u64(500..most * 1000));
        // The second of each role lives as long as the run: see `PROCESSES`.
        let first = PROCESSES[rng.usize(0..3) * 2];
        let any = PROCESSES[rng.usize(0..PROCESSES.len())];
        match rng.u32(0..100) {
            0..14 => Self::Kill(first, seconds(rng, 5)),
            14..22 => Self::Drain(first, seconds(rng, 5)),
            22..32 => Self::Stop(any, seconds(rng, 15)),
            32..38 => Self::RedisKill(seconds(rng, 6)),
            38..43 => Self::RedisFreeze(seconds(rng, 10)),
            43..48 => Self::RedisFull(seconds(rng, 8)),
            48..55 => Self::RedisClients(if rng.bool() { "pubsub" } else { "normal" }),
            55..58 => Self::ScriptFlush,
            58..61 => Self::BrokerRestart(seconds(rng, 5)),
            61..64 => Self::BrokerKill(seconds(rng, 5)),
            64..68 => Self::BrokerFreeze(seconds(rng, 15)),
            68..71 => Self::BrokerAlarm(seconds(rng, 8)),
            71..75 => Self::BrokerConnections,
            _ => {
                let links: Vec<&String> = installation.proxies.keys().collect();
                let link = links[rng.usize(0..links.len())].clone();
                let weather = match rng.u32(0..10) {
                    0..3 => Weather::Cut,
                    3..5 => Weather::BlackHole,
                    5..7 => Weather::AnswersLost,
                    7..9 => Weather::Delay(Duration::from_millis(rng.u64(20..400))),
                    _ => Weather::Slice(rng.usize(1..40)),
                };
                Self::Weather(link, weather, seconds(rng, 15))
            }
        }
    }

    /// What it happens to: two faults of one thing do not overlap.
    pub fn victim(&self) -> &str {
        match self {
            Self::Kill(who, _) | Self::Drain(who, _) | Self::Stop(who, _) => who,
            Self::RedisKill(_) | Self::RedisFreeze(_) | Self::RedisFull(_) => "redis",
            Self::RedisClients(_) | Self::ScriptFlush => "redis",
            Self::BrokerRestart(_) | Self::BrokerKill(_) | Self::BrokerFreeze(_) => "rabbitmq",
            Self::BrokerAlarm(_) | Self::BrokerConnections => "rabbitmq",
            Self::Weather(link, ..) => link,
        }
    }

    /// Does it, and ends it. A process may not be ready yet when this returns.
    pub async fn happen(&self, on: &Installation) -> Result<(), String> {
        match self {
            Self::Kill(who, pause) => {
                let mut process = on.process(who).lock().await;
                process.kill();
                sleep(*pause).await;
                process.spawn();
            }
            Self::Drain(who, pause) => {
                let mut process = on.process(who).lock().await;
                // The deadline of the drain itself is 10 s. Whether it was in good order is for the caller to say: with a
                // server away it cannot be.
                let status = process.drain(Duration::from_secs(25)).await;
                sleep(*pause).await;
                process.spawn();
                if !status.success() {
                    return Err(format!("{who} ended with {status}"));
                }
            }
            Self::Stop(who, time) => {
                let process = on.process(who).lock().await;
                process.pause();
                sleep(*time).await;
                process.resume();
            }
            Self::RedisKill(pause) => {
                let mut redis = on.redis.lock().await;
                redis.kill();
                sleep(*pause).await;
                block_in_place(|| redis.start());
            }
            Self::RedisFreeze(time) => {
                let redis = on.redis.lock().await;
                redis.pause();
                sleep(*time).await;
                redis.resume();
            }
            Self::RedisFull(time) => {
                let redis = on.redis.lock().await;
                block_in_place(|| redis.command(&["CONFIG", "SET", "maxmemory", "1"]));
                sleep(*time).await;
                block_in_place(|| redis.command(&["CONFIG", "SET", "maxmemory", "0"]));
            }
            Self::RedisClients(kind) => {
                let redis = on.redis.lock().await;
                block_in_place(|| redis.command(&["CLIENT", "KILL", "TYPE", kind]));
            }
            Self::ScriptFlush => {
                let redis = on.redis.lock().await;
                block_in_place(|| redis.command(&["SCRIPT", "FLUSH"]));
            }
            Self::BrokerRestart(pause) | Self::BrokerKill(pause) => {
                let mut rabbitmq = on.rabbitmq.lock().await;
                block_in_place(|| if matches!(self, Self::BrokerKill(_)) { rabbitmq.kill() } else { rabbitmq.stop() });
                sleep(*pause).await;
                block_in_place(|| rabbitmq.start());
            }
            Self::BrokerFreeze(time) => {
                let rabbitmq = on.rabbitmq.lock().await;
                rabbitmq.pause();
                sleep(*time).await;
                rabbitmq.resume();
            }
            Self::BrokerAlarm(time) => {
                let rabbitmq = on.rabbitmq.lock().await;
                block_in_place(|| rabbitmq.memory_alarm(true));
                sleep(*time).await;
                block_in_place(|| rabbitmq.memory_alarm(false));
            }
            Self::BrokerConnections => {
                let rabbitmq = on.rabbitmq.lock().await;
                block_in_place(|| rabbitmq.close_connections(&on.vhost));
            }
            Self::Weather(link, weather, time) => {
                on.proxies[link].weather(*weather);
                sleep(*time).await;
                on.proxies[link].weather(Weather::Fair);
            }
        }
        Ok(())
    }
}
