//! Fuzz targets: plain functions of arbitrary bytes that must neither panic nor allocate without bound. `fuzz/` runs
//! them under libFuzzer; a test replays its corpus.
