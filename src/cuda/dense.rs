//! The dense half of a layer for any number of rows, with products by cuBLASLt. Between them stand the kernels of
//! csrc/dense.cu, which round what a product reads to its weights' 16-bit type, once.

use super::dtype_code;
use super::rows::{self, Rows};
use super::weights::{GpuLayer, GpuModel, Projection};
use crate::device::cuda::Gpu;
use crate::device::cuda::bindings::abi::{
    specache_finish_qkv_params, specache_finish_qkv_plan, specache_norm16_params, specache_norm16_plan,
    specache_round16_params, specache_round16_plan, specache_swiglu16_params, specache_swiglu16_plan,
};
use crate::device::cuda::cublas::{Cublas, Product};
use crate::kv::KvShape;
use crate::model::Config;

/// What lies between the products of some rows. Each part is written and read by one step after the other, so that the
/// steps of a layer share it.
#[derive(Clone, Copy, Default)]
pub(super) struct Between {
    /// `[n, operand_width]` of 16 bits: what a product reads.
    pub operand: u64,
    /// `[n, product_width]` f32: q, k and v, or gate and up.
    pub products: u64,
}

impl Between {
    /// Numbers of a row's operand: the widest input of a projection.
    pub(super) fn operand_width(config: &Config) -> usize {
        config.hidden_size.max(config.n_heads * config.head_dim).max(config.intermediate_size)
    }

    /// Numbers of a row's products.
    pub(super) fn product_width(config: &Config) -> usize {
        let heads = config.n_heads + 2 * config.n_kv_heads;
        (heads * config.head_dim).max(2 * config.intermediate_size)
    }
}

/// What all launches of a pass have in common.
#[derive(Clone, Copy)]
pub(super) struct Dense<'a> {
    pub gpu: &'a Gpu,
    pub cublas: &'a Cublas,
    pub model: &'a GpuModel,
    pub config: &'a Config,
}

impl Dense<'_> {
    /// RMS norm and the products for q, k and v.
    pub(super) fn norm_qkv(&self, l: usize, rows: &Rows, between: &Between) {
        let GpuLayer { input_norm, q, k, v, .. } = self.model.layers[l];
        self.norm(rows.n, rows.x, input_norm, q.dtype, between, Some((l, rows.bad_layer)));
        self.products(rows.n, &[q, k, v], between, between.products);
    }

    /// What follows for these rows, or for neighbours of them whose caches have one number type: biases, norms of heads,
    /// RoPE; K and V go to the caches. `products`: of the first of them.
    pub(super) fn finish_qkv(&self, l: usize, rows: &Rows, products: u64, shape: &KvShape) {
        let GpuLayer { q, k, v, q_norm, k_norm, .. } = self.model.layers[l];
        let params = specache_finish_qkv_params {
            products,
            q_bias: q.bias,
            k_bias: k.bias,
            v_bias: v.bias,
            q_norm,
            k_norm,
            rope: rows.rope,
            append: rows.append,
            q: rows.q,
            n_rows: rows.n,
            n_heads: self.config.n_heads as u32,
            n_kv_heads: self.config.n_kv_heads as u32,
            head_dim: self.config.head_dim as u32,
            eps: self.config.rms_norm_eps,
            kv_dtype: dtype_code(shape.dtype),
        };
        self.gpu.launch(specache_finish_qkv_plan, &params);
    }

    /// `x += W_o attn`.
    pub(super) fn out_residual(&self, l: usize, rows: &Rows, between: &Between) {
        let o = self.model.layers[l].o;
        let params = specache_round16_params {
            x: rows.attn,
            y: between.operand,
            count: u64::from(rows.n) * u64::from(o.k),
            dtype: o.dtype,
            reserved: 0,
        };
        self.gpu.launch(specache_round16_plan, &params);
        self.product(rows.n, o, between, rows.x, o.n, true);
    }

    /// RMS norm, then gate and up, each row's side by side.
    pub(super) fn norm_gate_up(&self, l: usize, rows: &Rows, between: &Between) {
        let GpuLayer { post_norm, gate, up, .. } = self.model.layers[l];
        self.norm(rows.n, rows.x, post_norm, gate.dtype, between, None);
        self.products(rows.n, &[gate, up], between, between.products);
    }

    /// `x += W_down (silu(gate) * up)`.
    pub(super) fn down_residual(&self, l: usize, rows: &Rows, between: &Between) {
        let GpuLayer { gate, up, down, .. } = self.model.layers[l];
        let params = specache_swiglu16_params {
            gate: between.products,
            up: between.products + u64::from(gate.n) * 4,
            gate_bias: gate.bias,
            up_bias: up.bias,
            y: between.operand,
            n_rows: rows.n,
            intermediate: gate.n,
            stride: gate.n + up.n,
            dtype: down.dtype,
        };
        self.gpu.launch(specache_swiglu16_plan, &params);
        self.product(rows.n, down, between, rows.x, down.n, true);
    }

    /// Final norm and LM head of `n` rows of x. A head of fp32 has no such product.
    pub(super) fn norm_logits(&self, n: u32, x: u64, between: &Between, logits: u64) {
        let Dense { gpu, model, config, .. } = *self;
        let head = model.lm_head;
        if !head.is_16_bit() {
            return rows::Dense { gpu, model, config }.norm_logits(n, x, logits);
        }
        self.norm(n, x, model.final_norm, head.dtype, between, None);
        self.product(n, head, between, logits, head.n, false);
    }

    /// RMS norm of rows of x, rounded to `dtype`. `bad`: the layer, and where rows say that they were not finite in it.
    fn norm(&self, n_rows: u32, x: u64, norm: u64, dtype: u32, between: &Between, bad: Option<(usize, u64)>) {
        let (layer, bad_layer) = bad.unwrap_or_default();
        let params = specache_norm16_params {
            x,
            norm,
            y: between.operand,
            bad_layer,
            n_rows,
            hidden: self.config.hidden_size as u32,
            layer: layer as u32,
            eps: self.config.rms_norm_eps,
            dtype,
            reserved: 0,
        };
        self.gpu.launch(specache_norm16_plan, &params);
    }

    /// The products of one operand with several matrices, side by side in each row of y; matrices that follow each other
    /// in memory are one. Biases are left to what reads y.
    fn products(&self, n_rows: u32, matrices: &[Projection], between: &Between, mut y: u64) {
        let stride = matrices.iter().map(|w| w.n).sum();
        let mut rest = matrices;
        while let Some((&first, others)) = rest.split_first() {
            let mut joined = Projection { bias: 0, ..first };
            rest = others;
            while let Some((next, others)) = rest.split_first()
                && next.weight == joined.end()
            {
                joined.n += next.n;
                rest = others;
            }
            self.product(n_rows, joined, between, y, stride, false);
            y += u64::from(joined.n) * 4;
        }
    }

    fn product(&self, n_rows: u32, w: Projection, between: &Between, y: u64, y_stride: u32, adds: bool) {
        let Projection { weight, bias, dtype, n, k } = w;
        self.cublas.launch(&Product { weight, bias, x: between.operand, y, n_rows, k, n, y_stride, dtype, adds });
    }
}
