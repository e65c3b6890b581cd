//! A disk that does not get round to it: `fdatasync` of one process waits for as long as the test wants. A small library, made by
//! the C compiler that Rust links with, comes before the C library. What is written is in the system's memory all the same, so
//! SIGKILL does not lose it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use super::guard::folder;
use super::{SOON, until};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int fdatasync(int file) {
    const char *held = getenv("TEST_SYNC_HELD"), *waiting = getenv("TEST_SYNC_WAITING");
    while (held && waiting && access(held, F_OK) == 0) {
        int mark = open(waiting, O_CREAT | O_WRONLY, 0600);
        if (mark >= 0) close(mark);
        usleep(1000);
    }
    return (int)syscall(SYS_fdatasync, file);
}
"#;

static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = folder("disk");
    let (source, library) = (folder.join("disk.c"), folder.join("disk.so"));
    std::fs::write(&source, SOURCE).unwrap();
    let output = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
});

/// The disk of one process.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
}

impl Disk {
    /// One that is quick.
    pub fn new() -> Self {
        Self { folder: folder("sync") }
    }

    fn held(&self) -> PathBuf {
        self.folder.join("held")
    }

    fn waiting(&self) -> PathBuf {
        self.folder.join("waiting")
    }

    /// The environment of a process that is to have it.
    pub fn environment(&self) -> [(String, String); 3] {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        [
            ("LD_PRELOAD".to_owned(), text(LIBRARY.clone())),
            ("TEST_SYNC_HELD".to_owned(), text(self.held())),
            ("TEST_SYNC_WAITING".to_owned(), text(self.waiting())),
        ]
    }

    /// From here on no sync ends.
    pub fn hold(&self) {
        let _ = std::fs::remove_file(self.waiting());
        std::fs::write(self.held(), "").unwrap();
    }

    /// Waits until a sync waits.
    pub async fn wait_held(&self) {
        let waiting = self.waiting();
        until("a sync that waits", SOON, async || if waiting.exists() { Ok(()) } else { Err("none") }).await;
    }

    /// From here on syncs end.
    pub fn release(&self) {
        std::fs::remove_file(self.held()).unwrap();
    }
}
