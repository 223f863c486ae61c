//! The GPU's form of the operations in [`crate::ops`]: a model in its memory, the memory that the rows of a call share, and
//! the launches of a pass. Kernels, their parameters and their launch plans are in csrc/.
//!
//! A call gives the GPU all of its work and waits once, at its end.

mod bandwidth;
mod decode;
mod dense;
mod host_gather;
mod parts;
mod prefill;
mod rows;
mod weights;

pub(crate) use bandwidth::read_gbps;
pub use decode::layout::GpuTarget;
pub(crate) use decode::layout::workspace_bytes;
pub(crate) use decode::{Place, Workspace};

pub(crate) use prefill::{ChunkMemory, PromptStream, prefill_bytes};
pub(crate) use weights::{GpuModel, check_shape};

use crate::device::cuda::Gpu;
use crate::device::cuda::bindings::abi::{
    SPECACHE_BF16, SPECACHE_FP16, SPECACHE_FP32, specache_pack_params, specache_pack_plan,
};
use crate::kv::KvShape;
use crate::model::Dtype;

/// A number type as the kernels count them.
fn dtype_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F16 => SPECACHE_FP16,
        Dtype::Bf16 => SPECACHE_BF16,
        Dtype::F32 => SPECACHE_FP32,
    }
}

/// Quantises the `n` wide pages whose addresses are at `list` into packed pages from `packed` on.
pub(crate) fn pack_pages(gpu: &Gpu, shape: &KvShape, list: u64, n: usize, packed: u64) {
    let params = specache_pack_params {
        wide_pages: list,
        packed,
        n_pages: n as u32,
        n_kv_heads: shape.n_kv_heads as u32,
        head_dim: shape.head_dim as u32,
        bits: shape.packed.bits as u32,
        group_size: shape.packed.group_size as u32,
        dtype: dtype_code(shape.dtype),
    };
    gpu.launch(specache_pack_plan, &params);
}
