//! SpeCache in Rust.

pub mod context;
pub mod cpu;
pub mod decode;
pub mod device;
pub mod engine;
pub mod error;
pub mod kv;
pub mod model;
pub mod ops;
pub mod prefill;
pub mod reference;
pub mod sampler;
pub mod session;
pub mod teacher;
pub mod tokenizer;

pub use engine::Engine;
pub use error::{Error, Result};
pub use kv::{KvMode, KvOptions};
pub use session::{Buffers, Next, Prompt, Session};
