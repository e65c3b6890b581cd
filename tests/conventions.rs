//! What no compiler checks: the direction of imports, and that settings and metrics are documented.

#![allow(clippy::unwrap_used, reason = "a file that is missing is a test that fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Part of the crate, and the parts it may not use: `app → {worker, node, api} → ledger → broadcast`.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("worker", &["node", "api", "app", "command", "settings", "admin"]),
    ("node", &["worker", "api", "app", "command", "settings", "admin"]),
    ("api", &["worker", "node", "app", "command", "settings", "admin"]),
    ("ledger", &["worker", "node", "api", "app", "command", "settings", "admin", "amqp"]),
];

/// What the pure core may not name: no I/O, no clock.
const IMPURE: &[&str] = &["tokio", "redis", "lapin", "axum", "SystemTime", "Instant", "fs", "net", "env", "thread"];

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The source files of one part: `src/<part>.rs` and everything in `src/<part>/`.
fn files(part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(ROOT).join("src").join(part)];
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let file = Path::new(ROOT).join("src").join(format!("{part}.rs"));
    found.extend(file.exists().then_some(file));
    assert!(!found.is_empty(), "no source of {part}");
    found
}

/// The text without comments that have a line to themselves.
fn code(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The identifiers of a text.
fn identifiers(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect()
}

/// The parts of the crate that a text names: `a` of `crate::a::b`, `a` and `c` of `crate::{a::b, c}`.
fn used_parts(text: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for (at, prefix) in text.match_indices("crate::") {
        let rest = &text[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            used.insert(rest[..end].to_owned());
            continue;
        };
        let mut depth = 1;
        let mut name = String::new();
        let mut whole = false;
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => {
                    used.insert(std::mem::take(&mut name));
                    whole = false;
                }
                ':' if depth == 1 => whole = true,
                _ if depth == 1 && !whole && (c.is_alphanumeric() || c == '_') => name.push(c),
                _ => {}
            }
            if depth == 0 {
                used.insert(std::mem::take(&mut name));
                break;
            }
        }
    }
    used.remove("");
    used
}

#[test]
fn parts_are_used_in_one_direction() {
    for (part, forbidden) in FORBIDDEN {
        for file in files(part) {
            let text = code(&read(&file));
            let wrong: Vec<String> =
                used_parts(&text).into_iter().filter(|used| forbidden.contains(&used.as_str())).collect();
            assert!(wrong.is_empty(), "{} may not use {wrong:?}", file.display());
        }
    }
    for file in files("metrics") {
        let used = used_parts(&code(&read(&file)));
        assert!(used.is_empty(), "metrics is a leaf, but {} uses {used:?}", file.display());
    }
}

#[test]
fn the_core_is_pure() {
    for file in files("broadcast") {
        let text = code(&read(&file));
        let others: Vec<String> = used_parts(&text).into_iter().filter(|part| part != "broadcast").collect();
        assert!(others.is_empty(), "{} may not use {others:?}", file.display());
        let words = identifiers(&text);
        let impure: Vec<&&str> = IMPURE.iter().filter(|word| words.contains(**word)).collect();
        assert!(impure.is_empty(), "{} names {impure:?}", file.display());
    }
}

#[test]
fn the_scanner_sees_every_form_of_use() {
    let text = "use crate::{node::x::{api}, worker, metrics::Metrics};\nlet y = crate::ledger::redis::z();\n";
    let used = used_parts(text);
    assert_eq!(used.iter().map(String::as_str).collect::<Vec<_>>(), ["ledger", "metrics", "node", "worker"]);
    assert!(used_parts(&code("    // crate::node\n    /// [`crate::api`]\n")).is_empty());
}

/// The keys of a TOML text whose line above is no comment.
fn undocumented(toml: &str) -> Vec<&str> {
    let mut above = "";
    let mut missing = Vec::new();
    for line in toml.lines() {
        let is_key = line.starts_with(|c: char| c.is_ascii_lowercase()) && line.contains('=');
        if is_key && !above.starts_with('#') {
            missing.push(line);
        }
        above = line;
    }
    missing
}

#[test]
fn every_setting_is_documented() {
    let defaults = read(&Path::new(ROOT).join("src/default.toml"));
    assert!(defaults.lines().any(|line| line.starts_with("url")), "the defaults have keys at the start of a line");
    assert_eq!(undocumented(&defaults), Vec::<&str>::new(), "write a comment above each");
    assert_eq!(undocumented("# why\na = 1\nb = 2\n\n[c]\nd = 3\n"), ["b = 2", "d = 3"]);
}

#[test]
fn every_metric_is_documented() {
    let mut text = read(&Path::new(ROOT).join("README.md"));
    text.push_str(&read(&Path::new(ROOT).join("docs/OPERATIONS.md")));
    let words = identifiers(&text);
    let missing: Vec<&str> =
        broadcastd::metrics::CATALOGUE.iter().map(|(name, _)| *name).filter(|name| !words.contains(name)).collect();
    assert!(missing.is_empty(), "README.md and docs/OPERATIONS.md say nothing of {missing:?}");
}
