#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| broadcastd_fuzz::request::run(data));
