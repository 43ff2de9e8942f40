#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowstone_storage::fuzz_targets::pull_range(data));
