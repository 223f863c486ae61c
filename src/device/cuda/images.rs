//! What the kernels are loaded from: images that nvcc made when the program was built, or the sources themselves.

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// A file of csrc/ as the compiler sees it.
pub(crate) struct Source {
    /// As `#include` names it.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(Source { name: $name, text: include_str!(concat!("../../../csrc/", $name)) }),*]
    };
}

/// Each is a program of its own.
pub(crate) const KERNELS: &[Source] = sources![
    "attn_combine.cu",
    "attn_decode.cu",
    "attn_prefill.cu",
    "dense.cu",
    "draw.cu",
    "embed.cu",
    "fetch.cu",
    "linear.cu",
    "pack.cu",
    "post.cu",
    "read.cu",
    "sample.cu",
    "select.cu",
];

/// What they include.
pub(crate) const HEADERS: &[Source] = sources![
    "abi.h",
    "attn_units.cuh",
    "attn_work.h",
    "block.cuh",
    "common.cuh",
    "fetch_list.cuh",
    "kernels.h",
    "kv_layout.cuh",
    "prefill_work.h",
    "product.cuh",
    "ptx.cuh",
    "rows.cuh",
    "seq.cuh",
];
