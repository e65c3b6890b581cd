#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| broadcastd_fuzz::answers::run(data));
