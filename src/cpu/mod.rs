//! The fast CPU form of each operation: kernels written once over [`simd::Simd`] and compiled once per [`Isa`].

pub mod bandwidth;
mod element;
pub mod embed;
pub mod linear;
pub mod norm;
mod parallel;
// The attention kernels will use the rest of it.
#[allow(dead_code, unused_imports)]
pub mod simd;

pub use simd::Isa;
