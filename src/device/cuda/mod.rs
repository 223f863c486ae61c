//! NVIDIA GPUs: finding them, their driver, and what the engine needs of it.
//!
//! Nothing is linked: the driver's library is opened at run time, after [`probe`] has asked it whether it is one.

#[allow(missing_docs, unsafe_code, non_camel_case_types, non_snake_case, non_upper_case_globals, dead_code)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
pub(crate) mod bindings;
pub(crate) mod cublas;
pub(crate) mod driver;
pub(crate) mod gpu;
pub(crate) mod graph;
pub(crate) mod images;
pub(crate) mod kernels;
mod library;
pub(crate) mod mailbox;
pub(crate) mod memory;
pub(crate) mod nvrtc;
pub mod probe;
pub(crate) mod queues;
pub(crate) mod timing;
pub mod toolkit;

pub(crate) use gpu::Gpu;
pub(crate) use memory::{GpuMemory, PinnedMemory, Register};
