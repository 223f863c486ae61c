//! The GPU's form of the operations in [`crate::ops`]: a model in its memory, the memory that the rows of a call share, and
//! the launches of a pass. Kernels, their parameters and their launch plans are in csrc/.
//!
//! A call gives the GPU all of its work and waits once, at its end.

mod decode;
mod prefill;
mod rows;
mod weights;

pub(crate) use decode::{Place, Workspace};

pub(crate) use prefill::PromptStream;
pub(crate) use weights::{GpuModel, check_shape};

use crate::device::cuda::bindings::abi::{SPECACHE_BF16, SPECACHE_FP16, SPECACHE_FP32};
use crate::model::Dtype;

/// A number type as the kernels count them.
fn dtype_code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F16 => SPECACHE_FP16,
        Dtype::Bf16 => SPECACHE_BF16,
        Dtype::F32 => SPECACHE_FP32,
    }
}
