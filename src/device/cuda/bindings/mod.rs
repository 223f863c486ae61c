//! Declarations made from C headers by tools/bindings.sh.
#![allow(unsafe_code)] // What travels as bytes.

pub mod abi;
pub mod driver;

use bytemuck::{Pod, Zeroable};

// SAFETY: plain numbers without padding, which csrc/abi.h asserts by their sizes; zeros are numbers.
unsafe impl Zeroable for abi::specache_seq {}
// SAFETY: as above.
unsafe impl Pod for abi::specache_seq {}
// SAFETY: as above.
unsafe impl Zeroable for abi::specache_layer_cache {}
// SAFETY: as above.
unsafe impl Pod for abi::specache_layer_cache {}
// SAFETY: as above.
unsafe impl Zeroable for abi::specache_choice {}
// SAFETY: as above.
unsafe impl Pod for abi::specache_choice {}
// SAFETY: as above.
unsafe impl Zeroable for abi::specache_draw {}
// SAFETY: as above.
unsafe impl Pod for abi::specache_draw {}
