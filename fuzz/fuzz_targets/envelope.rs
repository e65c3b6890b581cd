#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| broadcastd_fuzz::envelope::run(data));
