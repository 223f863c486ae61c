//! Prefill on the GPU.
