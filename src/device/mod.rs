//! Streams, events and memory.

pub mod map;
