//! What was written by hand for the fuzzers, and what they found, once more: every file of `fuzz/corpus` through its target.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a file that cannot be read is a test that fails")]

use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
mod targets;

#[test]
fn every_target_takes_its_corpus() {
    let mut failed = Vec::new();
    for (name, run) in targets::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut files = 0;
        for entry in folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.unwrap().path();
            let data = std::fs::read(&path).unwrap();
            if std::panic::catch_unwind(|| run(&data)).is_err() {
                failed.push(path);
            }
            files += 1;
        }
        assert!(files >= 10, "{name} has {files} files");
    }
    assert!(failed.is_empty(), "the targets fail on {failed:#?}");
}
