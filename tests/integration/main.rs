//! Real processes against real servers: the built binary, RabbitMQ and Redis, all started here on ports and folders of their
//! own. Everything that is started ends with this process, however it ends (see `support::guard`).
//!
//! One test is one function in one of the modules; each has apps, a vhost and a key prefix of its own, so they run in parallel.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod calls;
mod clocks;
mod cluster;
mod commands;
mod crash;
mod crash_loop;
mod differential;
mod direct;
mod drain;
mod durability;
mod edges;
mod embedded;
mod end_to_end;
mod expiry;
mod failover;
mod faults;
mod feed;
mod hostile;
mod opening;
mod permissions;
mod redis_away;
mod requests;
mod retained;
mod secrets;
mod security;
mod selftest;
mod settings;
mod slots;
mod sockets;
mod standalone;
mod submitter;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod versions;
