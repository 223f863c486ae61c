//! SpeCache in Rust.

pub mod cpu;
pub mod decode;
pub mod device;
pub mod engine;
pub mod error;
pub mod gather;
pub mod kv;
pub mod model;
pub mod ops;
pub mod prefill;
pub mod reference;
pub mod sampler;
pub mod teacher;
pub mod tokenizer;

pub use engine::{Buffers, Engine, Next, Prompt, Session};
pub use error::{Error, Result};
pub use kv::{KvMode, KvOptions};
