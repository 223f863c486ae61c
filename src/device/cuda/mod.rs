//! NVIDIA GPUs. So far: finding them. Nothing computes on them yet.

pub mod probe;
