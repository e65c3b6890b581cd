//! Constant load with random faults, for as long as asked: `tests/run soak [SECONDS]`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a run that fails")]

#[path = "../support/mod.rs"]
mod support;

fn main() {}
