//! Named points of the code at which a test kills or stops the process from outside, with the variable `FAILPOINTS`:
//!
//! ```text
//! FAILPOINTS='worker::before-reply=return(kill)'            at the first pass
//! FAILPOINTS='worker::before-reply=3*off->1*return(stop)'   SIGSTOP at the fourth; SIGCONT lets it go on
//! FAILPOINTS='worker::before-ledger=return(kill poison-1)'  only for this request id
//! FAILPOINTS='feed::message=1*return(skip)'                 the caller leaves out what follows
//! ```
//!
//! Compiled out of release builds. [`POINTS`] lists them all.

/// Every point, and what has happened when it is passed.
pub const POINTS: &[(&str, &str)] = &[
    ("worker::before-ledger", "a request was read; the ledger does not know of it (subject: its id)"),
    ("ledger::before-answer", "Redis carried out a batch of accepts; nobody has seen the answers"),
    ("worker::before-reply", "a request was accepted; nobody was told (subject: its id)"),
    ("worker::before-ack", "replies of accepted requests were sent; nothing is acknowledged"),
    ("worker::refusal-before-ack", "a request was refused; it is neither acknowledged nor answered (subject: its id)"),
    ("worker::refusal-after-ack", "a refused request was acknowledged; its sender was not told (subject: its id)"),
    ("worker::after-dead-letter", "dead letters are stored; the requests are not acknowledged"),
    ("redrive::before-ack", "a dead letter is back in the queue of requests; it is not taken off the dead letters"),
    ("feed::message", "an envelope arrived on a node's channel (skip: as if it had been lost)"),
    ("node::after-subscribe", "a node has subscribed to an app; it has neither lease nor snapshot (subject: the app)"),
    (
        "node::after-snapshot",
        "a node has lease and snapshot of an app; its devices see nothing of it (skip: not yet; 10 ms a pass)",
    ),
    ("node::mid-sweep", "a broadcast was sent to one session; the others follow"),
    ("embedded::before-commit", "a group of operations is written; it is not committed"),
    ("embedded::after-commit", "a group of operations is committed; nobody was told"),
    ("api::after-enqueue", "a request is in the queue; its reply has not come"),
];

/// Does what the environment says for this point. `subject` is what is passing, where that matters.
///
/// Returns whether the caller is to leave out what follows.
#[cfg(debug_assertions)]
#[allow(clippy::must_use_candidate, reason = "most points have nothing to leave out")]
pub fn reached(point: &str, subject: &str) -> bool {
    debug_assert!(POINTS.iter().any(|(name, _)| *name == point), "{point} is not listed");
    fail::fail_point!(point, |action| act(&action.unwrap_or_default(), subject));
    false
}

/// Nothing: release builds have no such points.
#[cfg(not(debug_assertions))]
#[inline(always)]
#[allow(clippy::must_use_candidate, reason = "most points have nothing to leave out")]
pub fn reached(_point: &str, _subject: &str) -> bool {
    false
}

#[cfg(debug_assertions)]
fn act(action: &str, subject: &str) -> bool {
    use rustix::process::{Signal, getpid, kill_process};
    let (what, only) = action.split_once(' ').unwrap_or((action, ""));
    if !only.is_empty() && only != subject {
        return false;
    }
    let signal = match what {
        "skip" => return true,
        "stop" => Signal::STOP,
        _ => Signal::KILL,
    };
    // To oneself it always may be sent; SIGKILL does not return.
    let _ = kill_process(getpid(), signal);
    // SIGSTOP is taken by whichever thread comes by first; this one is not to go past the point before all of them stand.
    while signal == Signal::STOP && is_pending(signal) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    false
}

/// Whether the signal was sent to this process and no thread has taken it yet.
#[cfg(debug_assertions)]
fn is_pending(signal: rustix::process::Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    pending >> (signal.as_raw() - 1) & 1 == 1
}
