//! The fast CPU form of each operation: kernels written once over [`simd::Simd`] and compiled once per [`Isa`].
#![allow(unsafe_code)] // Lane operations on raw pointers, and slices whose parts several tasks write.

mod attn_chunk;
pub mod attn_decode;
mod attn_kernels;
pub mod attn_prefill;
pub mod bandwidth;
mod disjoint;
mod element;
pub mod embed;
pub mod linear;
pub mod norm;
pub mod pack;
mod parallel;
pub(crate) mod round;
pub mod select;
pub mod simd;

pub use simd::Isa;
