//! The Lua scripts, each a file of its own, joined with the prelude they share.

use redis::Script;

use crate::ledger::Generation;

/// All scripts of the ledger, for one life of the data: a server of another life (restarted, promoted) does not know them, and
/// so never runs one with a generation that is no longer true, whatever reconnects behind our back.
pub(super) struct Scripts {
    pub(super) generation: Generation,
    pub(super) accept: Source,
    pub(super) recall: Source,
    pub(super) join: Source,
    pub(super) renew: Source,
    pub(super) restore: Source,
    pub(super) history: Source,
}

/// A script's text and the hash that EVALSHA names it by.
pub(super) struct Source {
    pub(super) text: String,
    pub(super) sha: String,
}

const PRELUDE: &str = include_str!("scripts/prelude.lua");
const TIME: &str = "local time = redis.call('TIME')\n  return time[1] * 1000000 + time[2]";
const SLACK: &str = "local SLACK = 0";

impl Scripts {
    /// `test_clock_key`: see [`super::RedisSettings::test_clock_key`].
    pub(super) fn new(test_clock_key: Option<&str>, generation: &Generation) -> Self {
        let prelude = match test_clock_key {
            None => PRELUDE.to_owned(),
            // Keys must not expire by the real clock while the test's stands still.
            Some(key) => PRELUDE
                .replace(TIME, &format!("return tonumber(redis.call('GET', '{key}'))"))
                .replace(SLACK, "local SLACK = 86400000"),
        };
        let source = |body: &str| {
            let text = format!("{prelude}\n{body}\n-- {}\n", generation.0);
            let sha = Script::new(&text).get_hash().to_owned();
            Source { text, sha }
        };
        Self {
            generation: generation.clone(),
            accept: source(include_str!("scripts/accept.lua")),
            recall: source(include_str!("scripts/recall.lua")),
            join: source(include_str!("scripts/join.lua")),
            renew: source(include_str!("scripts/renew.lua")),
            restore: source(include_str!("scripts/restore.lua")),
            history: source(include_str!("scripts/history.lua")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prelude_still_holds_what_the_test_clock_replaces() {
        assert_eq!(PRELUDE.matches(TIME).count(), 1);
        assert_eq!(PRELUDE.matches(SLACK).count(), 1);
        assert!(PRELUDE.starts_with("#!lua\n"));
    }
}
