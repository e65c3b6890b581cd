//! The rows of the fault table that need many devices, much time or a quiet machine: `tests/run faults` runs them, one after
//! the other. The others are in `tests/integration`; `tests/FAULTS.md` says which is where.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod devices;
mod flood;
mod redis_away;
mod rolling;
mod storm;
#[path = "../support/mod.rs"]
mod support;
