//! The fast CPU form of each operation: kernels written once over [`simd::Simd`] and compiled once per [`Isa`].

// The kernels that will use all of it come one by one.
#[allow(dead_code)]
pub mod simd;

pub use simd::Isa;
