//! SpeCache in Rust.

pub mod cpu;
pub mod device;
pub mod error;
pub mod kv;
pub mod model;
