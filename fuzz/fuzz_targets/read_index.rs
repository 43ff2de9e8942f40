#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowstone_storage::fuzz_targets::read_index(data));
