#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowstone_protocol::fuzz_targets::decompress(data));
