//! The KV cache of a sequence: what lies where, what moves when.

pub mod cache;
pub mod counters;
pub mod fetch;
pub mod host;
pub mod layout;
pub mod options;
pub mod plan;
pub mod prefetch;
pub mod slab;
mod synthetic;
mod tables;
pub mod view;

pub use cache::{Cache, LayerCache};
pub use counters::Counters;
pub use layout::KvShape;
pub use options::{KvMode, KvOptions, PAGE};
pub use plan::CacheBytes;
