//! The KV cache of a sequence.

pub mod options;

pub use options::{KvMode, KvOptions, PAGE};
