//! The dense half of a layer for up to 16 rows by the fused kernels: every weight is read once for all of them.

use super::weights::{GpuLayer, GpuModel, Projection};
use crate::device::LinearPath;
use crate::device::cuda::Gpu;
use crate::device::cuda::bindings::abi::{
    SPECACHE_MAX_ROWS, specache_gate_up_params, specache_gate_up_plan, specache_head_norm_plan, specache_linear_params,
    specache_logits_plan, specache_qkv_params, specache_qkv_plan, specache_residual_plan,
};
use crate::kv::KvShape;
use crate::model::Config;

/// Rows of a launch.
pub(super) const MAX_ROWS: usize = SPECACHE_MAX_ROWS as usize;
const _: () = assert!(MAX_ROWS == LinearPath::FUSED_ROWS);

/// Addresses of the activations of some rows, f32.
#[derive(Clone, Copy, Default)]
pub(super) struct Rows {
    /// At most [`MAX_ROWS`] for the fused kernels.
    pub n: u32,
    /// `[n, hidden]`.
    pub x: u64,
    /// `[n, n_heads, head_dim]`.
    pub q: u64,
    /// `[n, n_kv_heads, head_dim]`: K before its norm, where there is one.
    pub k: u64,
    /// `[n, n_heads, head_dim]`.
    pub attn: u64,
    /// `[n, intermediate]`.
    pub inner: u64,
    /// `[n, head_dim / 2, 2]`: cosines and sines.
    pub rope: u64,
    /// `[n]` u64: where this layer's K of each row goes.
    pub append: u64,
    /// `[n]` u32.
    pub bad_layer: u64,
}

/// What all launches of a pass have in common.
#[derive(Clone, Copy)]
pub(super) struct Dense<'a> {
    pub gpu: &'a Gpu,
    pub model: &'a GpuModel,
    pub config: &'a Config,
}

impl Dense<'_> {
    /// RMS norm, q, k, v, RoPE; K and V go to the cache.
    pub(super) fn norm_qkv_rope(&self, l: usize, rows: &Rows, shape: &KvShape) {
        let Dense { gpu, model, config } = *self;
        let GpuLayer { input_norm, q, k, v, q_norm, k_norm, .. } = model.layers[l];
        let params = specache_qkv_params {
            x: rows.x,
            norm: input_norm,
            q_weight: q.weight,
            k_weight: k.weight,
            v_weight: v.weight,
            q_bias: q.bias,
            k_bias: k.bias,
            v_bias: v.bias,
            q_norm,
            k_norm,
            k: rows.k,
            rope: rows.rope,
            append: rows.append,
            q: rows.q,
            bad_layer: rows.bad_layer,
            n_rows: rows.n,
            hidden: config.hidden_size as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            head_dim: config.head_dim as u32,
            layer: l as u32,
            eps: config.rms_norm_eps,
            dtype: q.dtype,
            kv_dtype: super::dtype_code(shape.dtype),
            reserved: 0,
        };
        gpu.launch(specache_qkv_plan, &params);
        if q_norm != 0 {
            gpu.launch(specache_head_norm_plan, &params);
        }
    }

    /// `x += W_o attn`.
    pub(super) fn out_residual(&self, l: usize, rows: &Rows) {
        self.gpu.launch(specache_residual_plan, &self.linear(self.model.layers[l].o, rows.n, rows.attn, 0, rows.x));
    }

    /// RMS norm, then `silu(W_gate x) * W_up x`.
    pub(super) fn norm_gate_up(&self, l: usize, rows: &Rows) {
        let GpuLayer { post_norm, gate, up, .. } = self.model.layers[l];
        let params = specache_gate_up_params {
            x: rows.x,
            norm: post_norm,
            gate_weight: gate.weight,
            up_weight: up.weight,
            gate_bias: gate.bias,
            up_bias: up.bias,
            y: rows.inner,
            n_rows: rows.n,
            hidden: gate.k,
            intermediate: gate.n,
            eps: self.config.rms_norm_eps,
            dtype: gate.dtype,
            reserved: 0,
        };
        self.gpu.launch(specache_gate_up_plan, &params);
    }

    /// `x += W_down inner`.
    pub(super) fn down_residual(&self, l: usize, rows: &Rows) {
        self.gpu.launch(specache_residual_plan, &self.linear(self.model.layers[l].down, rows.n, rows.inner, 0, rows.x));
    }

    /// Final norm and LM head of `n` rows of x, any number.
    pub(super) fn norm_logits(&self, n: u32, x: u64, logits: u64) {
        let head = self.model.lm_head;
        for first in (0..n).step_by(MAX_ROWS) {
            let of_row = |part: u64, width: u32| part + u64::from(first) * u64::from(width) * 4;
            let (x, logits) = (of_row(x, head.k), of_row(logits, head.n));
            let params = self.linear(head, SPECACHE_MAX_ROWS.min(n - first), x, self.model.final_norm, logits);
            self.gpu.launch(specache_logits_plan, &params);
        }
    }

    fn linear(&self, w: Projection, n_rows: u32, x: u64, norm: u64, y: u64) -> specache_linear_params {
        let eps = self.config.rms_norm_eps;
        specache_linear_params {
            x,
            norm,
            weight: w.weight,
            bias: w.bias,
            y,
            n_rows,
            k: w.k,
            n: w.n,
            eps,
            dtype: w.dtype,
            reserved: 0,
        }
    }
}
