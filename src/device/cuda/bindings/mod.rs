//! Declarations made from C headers by tools/bindings.sh.

pub mod abi;
pub mod driver;
