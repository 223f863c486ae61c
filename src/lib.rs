//! SpeCache in Rust.

pub mod device;
pub mod error;
pub mod kv;
pub mod model;
pub mod sampler;
pub mod tokenizer;
