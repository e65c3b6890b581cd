//! A wrong system clock for one process: a small library, made by the C compiler that Rust links with, comes before the C
//! library. Time that only measures durations stays right.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use super::guard::folder;

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long seconds_off(void) {
    const char *text = getenv("TEST_CLOCK_OFF");
    return text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = (int)syscall(SYS_clock_gettime, clock, now);
    if (status == 0 && clock == CLOCK_REALTIME) now->tv_sec += seconds_off();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int status = (int)syscall(SYS_gettimeofday, now, zone);
    if (status == 0) now->tv_sec += seconds_off();
    return status;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
"#;

static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = folder("clock");
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    std::fs::write(&source, SOURCE).unwrap();
    let output = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
});

/// The environment that puts a process's clock so many seconds off.
pub fn off(seconds: i64) -> [(String, String); 2] {
    [
        ("LD_PRELOAD".to_owned(), LIBRARY.to_str().unwrap().to_owned()),
        ("TEST_CLOCK_OFF".to_owned(), seconds.to_string()),
    ]
}
