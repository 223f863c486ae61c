//! What of the CUDA toolkit this program needs on a machine with a GPU, and finds there: for those who set one up.

use std::path::PathBuf;

use super::{images, library, nvrtc};

/// Where kernels and matrix products would come from.
#[derive(Clone, Debug)]
pub struct Toolkit {
    /// nvcc compiled the kernels when this program was built; else NVRTC does when they are needed first.
    pub built_in: bool,
    /// Whether NVRTC can be opened; if not, where it was looked for.
    pub nvrtc: Result<(), String>,
    /// Whether cuBLASLt can be opened; if not, where it was looked for.
    pub cublas: Result<(), String>,
    /// Where kernels that NVRTC has compiled are kept; `None` where neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub cache: Option<PathBuf>,
}

/// Looks for what there is. What it opens stays open.
pub fn find() -> Toolkit {
    Toolkit {
        built_in: images::BUILT.is_some(),
        nvrtc: library::open("nvrtc"),
        cublas: library::open("cublasLt"),
        cache: nvrtc::folder(),
    }
}
