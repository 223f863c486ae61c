//! The fused operations of a step: shapes checked here, then one dispatch to the device's form.
//!
//! Every operation has a plain twin in [`crate::reference`].

pub mod attn_decode;
pub mod attn_prefill;
pub mod kv;
pub mod linear;
pub mod pack;
pub mod select;
