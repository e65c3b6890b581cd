//! What no compiler checks: the direction of imports, and that settings and metrics are documented.

#![allow(clippy::unwrap_used, reason = "a file that is missing is a test that fails")]

use std::collections::{BTreeMap, BTreeSet};
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

/// The rows of the fault table: number, and the text of each field.
fn fault_rows(table: &str) -> Vec<(u32, BTreeMap<&str, String>)> {
    let mut rows = Vec::new();
    for block in table.split("\n### ").skip(1) {
        // What follows the table, under headings of its own, is no part of its last row.
        let block = block.split("\n## ").next().unwrap();
        let number = block.split('.').next().unwrap().parse().unwrap();
        let fields = block.split("\n\n").filter_map(|paragraph| paragraph.split_once(": "));
        rows.push((number, fields.map(|(field, text)| (field, text.replace('\n', " ").trim().to_owned())).collect()));
    }
    rows
}

/// Whether a test of this name is there, and is run: `tests/integration/faults.rs: its_name`.
fn find_test(reference: &str) -> Result<(), String> {
    let (file, name) = reference.split_once(": ").ok_or_else(|| format!("`{reference}` is not `file: name`"))?;
    let text = std::fs::read_to_string(Path::new(ROOT).join(file)).map_err(|error| format!("{file}: {error}"))?;
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let wanted = format!("fn {name}(");
    let at = lines.iter().position(|line| line.contains(&wanted)).ok_or_else(|| format!("{file} has no {name}"))?;
    let attributes = || lines[..at].iter().rev().take_while(|line| line.starts_with('#') || line.starts_with("//"));
    let is_test = |line: &&str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
    if !attributes().any(is_test) {
        return Err(format!("{name} is no test"));
    }
    if attributes().any(|line| line.starts_with("#[ignore")) { Err(format!("{name} is not run")) } else { Ok(()) }
}

/// What is wrong with one row of the fault table, or one section of the same form.
fn flaws(fields: &BTreeMap<&str, String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for field in ["must", "test", "seen", "broken"] {
        if fields.get(field).is_none_or(|text| text.len() < 5) {
            wrong.push(format!("no `{field}`"));
        }
    }
    if let Some((field, _)) = fields.iter().find(|(_, text)| text.to_uppercase().contains("NOT YET HELD")) {
        wrong.push(format!("`{field}` says that it is not held"));
    }
    let mut references = fields.get("test").map_or("", String::as_str).split('`').skip(1).step_by(2).peekable();
    if references.peek().is_none() {
        wrong.push("`test` names none in backticks".to_owned());
    }
    wrong.extend(references.filter_map(|test| find_test(test).err()));
    wrong
}

#[test]
fn every_row_of_the_fault_table_has_a_test() {
    let table = read(&Path::new(ROOT).join("tests/FAULTS.md"));
    let rows = fault_rows(&table);
    assert_eq!(rows.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (1..=41).collect::<Vec<_>>());
    let wrong: Vec<String> = rows
        .iter()
        .flat_map(|(number, fields)| flaws(fields).into_iter().map(move |why| format!("row {number}: {why}")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_row_with_a_flaw_is_found() {
    const GOOD: &str = "\n### 7. it breaks\n\nmust: be whole\n\ntest: \
        `tests/conventions.rs: a_row_with_a_flaw_is_found`\n\nseen: it was\n\nbroken: it was not\n";
    let flaws_of = |change: (&str, &str)| {
        let text = GOOD.replace(change.0, change.1);
        assert!(change.0 == change.1 || text != GOOD, "{change:?} changes nothing");
        let rows = fault_rows(&text);
        assert_eq!((rows.len(), rows[0].0), (1, 7));
        flaws(&rows[0].1).join("; ")
    };
    assert_eq!(flaws_of(("it was not", "it was not")), "");
    assert!(flaws_of(("`", "")).contains("names none in backticks"));
    assert!(flaws_of(("must: be whole", "must: ")).contains("no `must`"));
    assert!(flaws_of(("must: be whole\n\n", "")).contains("no `must`"));
    assert!(flaws_of(("broken: it was not", "")).contains("no `broken`"));
    assert!(flaws_of(("seen: it was", "seen: NOT YET HELD as worded")).contains("not held"));
    assert!(
        flaws_of(("a_row_with_a_flaw", "no_such_row")).contains("tests/conventions.rs has no no_such_row_is_found")
    );
}

#[test]
fn every_test_of_the_security_section_is_there() {
    let table = read(&Path::new(ROOT).join("tests/FAULTS.md"));
    let (_, security) = table.split_once("\n## Security\n").unwrap();
    let mut wrong = Vec::new();
    for section in security.split("\n## ").skip(1) {
        let title = section.lines().next().unwrap();
        let fields = section.split("\n\n").filter_map(|paragraph| paragraph.trim().split_once(": "));
        let fields = fields.map(|(field, text)| (field, text.replace('\n', " "))).collect();
        wrong.extend(flaws(&fields).into_iter().map(|why| format!("{title}: {why}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_missing_or_ignored_test_is_found() {
    assert!(find_test("tests/conventions.rs: a_missing_or_ignored_test_is_found").is_ok());
    assert!(find_test("tests/conventions.rs: no_such_test").is_err());
    assert!(find_test("tests/conventions.rs: fault_rows").is_err(), "a function, but no test");
}

/// Names of what only its owner knows, or what is compared with it.
const SECRET_NAMES: &[&str] =
    &["secret", "expose_secret", "check_sum", "checksum", "password", "signature", "mac", "expected", "digest"];

/// The lines on which `==` or `!=` has a secret on one of its sides.
fn compared_secrets(code: &str) -> Vec<&str> {
    let last_name = |text: &str| {
        let text = text.trim_end_matches(|c: char| !c.is_alphanumeric() && c != '_');
        text.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default().to_owned()
    };
    // A literal is no secret, whatever it says: it is the name of one.
    let operand_after = |text: &str| {
        if text.starts_with('"') {
            return String::new();
        }
        let end = text.find([' ', ',', ';', '{', '|', ')']).unwrap_or(text.len());
        last_name(&text[..end])
    };
    let is_secret = |name: String| SECRET_NAMES.contains(&name.as_str());
    let compares = |line: &&str| {
        ["==", "!="].iter().any(|operator| {
            line.match_indices(operator).any(|(at, _)| {
                is_secret(last_name(&line[..at])) || is_secret(operand_after(line[at + 2..].trim_start()))
            })
        })
    };
    code.lines().filter(compares).collect()
}

/// By the names on both sides: it finds the mistake that is made by habit, not one that is hidden.
#[test]
fn secrets_are_compared_in_constant_time() {
    for part in ["api", "node", "worker", "ledger", "command", "settings", "app", "amqp", "admin"] {
        for file in files(part).into_iter().filter(|file| !file.to_string_lossy().contains("test")) {
            let text = read(&file);
            let text = code(text.split("#[cfg(test)]").next().unwrap());
            assert_eq!(compared_secrets(&text), Vec::<&str>::new(), "{}: use subtle's ct_eq", file.display());
        }
    }
    let signature = read(&Path::new(ROOT).join("src/api/signature.rs"));
    assert!(signature.contains(".ct_eq(self.check_sum.as_bytes())"), "the one comparison of check sums");
    let wrong = "if a.secret.expose_secret() == b {\nif sum != self.check_sum {\nlet x = expected == y;\n";
    assert_eq!(compared_secrets(wrong).len(), 3);
    assert!(compared_secrets("if name == \"secret\" && key == other {\n").is_empty());
}

/// The code in which the library of the failpoints is named, but for the items and statements that `#[cfg(debug_assertions)]` is
/// written above.
fn failpoints_of_release_builds(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut left_out: Option<usize> = None;
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        let indent = line.len() - line.trim_start().len();
        if let Some(at) = left_out {
            // It ends where a line no further in than its beginning ends it; attributes belong to it.
            let ends = line.ends_with(';') || line.trim_end() == "}";
            if indent <= at && ends {
                left_out = None;
            }
            continue;
        }
        if line.trim() == "#[cfg(debug_assertions)]" {
            left_out = Some(indent);
        } else if line.contains("fail::") || line.contains("fail_point!") || line.contains("kill_process") {
            found.push(line);
        }
    }
    found
}

/// That no release build can be stopped or killed by its environment. It reads the code: CI builds no release.
#[test]
fn failpoints_are_compiled_for_debug_builds_only() {
    let mut named = 0;
    for file in files("").into_iter().filter(|file| !file.to_string_lossy().contains("test")) {
        let text = read(&file);
        named += text.matches("fail::").count();
        assert_eq!(failpoints_of_release_builds(&text), Vec::<&str>::new(), "{}: in a release build", file.display());
    }
    assert!(named >= 2, "the failpoints were not found");
    let manifest = read(&Path::new(ROOT).join("Cargo.toml"));
    let (_, release) = manifest.split_once("[profile.release]").unwrap();
    assert!(!release.split("\n[").next().unwrap().contains("debug-assertions"), "release builds are without them");
    let wrong = "#[cfg(debug_assertions)]\nfn a() {\n    fail::x();\n}\nfn b() {\n    fail::x();\n}\n";
    assert_eq!(failpoints_of_release_builds(wrong), ["    fail::x();"]);
}
