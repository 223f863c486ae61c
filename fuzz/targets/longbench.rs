#![no_main]

#[path = "../../tests/common/formats.rs"]
mod formats;

libfuzzer_sys::fuzz_target!(|data: &[u8]| formats::run(&formats::LONGBENCH, data));
