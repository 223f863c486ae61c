//! The fast CPU form of each operation: kernels written once over [`simd::Simd`] and compiled once per [`Isa`].
#![allow(unsafe_code)] // Lane operations on raw pointers, and slices whose parts several tasks write.

pub mod attn_decode;
mod attn_kernels;
pub mod attn_prefill;
mod disjoint;
pub mod pack;
pub mod select;
// The kernels that will use all of it come one by one.
#[allow(dead_code)]
pub mod simd;

pub use simd::Isa;
