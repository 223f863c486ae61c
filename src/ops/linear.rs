//! The dense part of a layer: embedding, norms, projections, RoPE, MLP.

pub use crate::cpu::linear::Path;
use crate::cpu::linear::{Part, project, project_add, swiglu};
use crate::cpu::{embed as embedding, norm};
use crate::cuda::{self, GpuModel};
use crate::device::Device;
use crate::device::order::Uses;
use crate::model::rope::RopeTable;
use crate::model::{Config, Layer, Model};

/// Buffers that the rows of a call share, layer after layer. Row-major; grown to the largest call and then kept.
#[derive(Default)]
pub struct Rows {
    /// Rows of this call.
    pub n: usize,
    /// `[n, hidden]`: the residual stream.
    pub x: Vec<f32>,
    /// `[n, hidden]`: x after a norm.
    pub normed: Vec<f32>,
    /// `[n, n_heads, head_dim]`: after RoPE.
    pub q: Vec<f32>,
    /// `[n, n_kv_heads, head_dim]`: after RoPE.
    pub k: Vec<f32>,
    /// `[n, n_kv_heads, head_dim]`.
    pub v: Vec<f32>,
    /// `[n, n_heads, head_dim]`: attention's output.
    pub attn: Vec<f32>,
    /// `[n, intermediate]`.
    pub mlp: Vec<f32>,
    /// `[head_dim / 2]` of the position at hand.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// On a GPU: all of the above, and what attention needs beside it.
    pub(crate) gpu: cuda::Workspace,
}

impl Rows {
    /// Room for `n` rows of a model. Old contents mean nothing afterwards.
    pub fn resize(&mut self, config: &Config, n: usize) {
        self.n = n;
        let kv = config.n_kv_heads * config.head_dim;
        for (buffer, width) in [
            (&mut self.x, config.hidden_size),
            (&mut self.normed, config.hidden_size),
            (&mut self.q, config.n_heads * config.head_dim),
            (&mut self.k, kv),
            (&mut self.v, kv),
            (&mut self.attn, config.n_heads * config.head_dim),
            (&mut self.mlp, config.intermediate_size),
        ] {
            buffer.resize(n * width, 0.0);
        }
        self.cos.resize(config.head_dim / 2, 0.0);
        self.sin.resize(config.head_dim / 2, 0.0);
    }
}

/// `x[i]` = embedding of `tokens[i]`. Ids were checked against the vocabulary.
pub fn embed(device: &Device, model: &Model, tokens: &[u32], x: &mut [f32]) {
    let _embed = device.operation("embed", |_| {});
    embedding::embed(device.isa(), &model.weights.embed, tokens, x);
}

/// The dense part of a pass: what stays the same from layer to layer.
#[derive(Clone, Copy)]
pub struct Dense<'a> {
    /// Where it is computed.
    pub device: &'a Device,
    /// Shapes and constants.
    pub config: &'a Config,
    /// RoPE frequencies.
    pub rope: &'a RopeTable,
    /// How products are computed: row by row in decode, by panels in prefill.
    pub path: Path,
    /// The model on a GPU, if that computes.
    pub(crate) gpu: Option<&'a GpuModel>,
}

impl Dense<'_> {
    /// RMS norm, q, k, v (with the per-head norms of Qwen3), RoPE at `position(row)`. `not_finite(row)` is called for
    /// rows whose input is no longer a number; a GPU tells of them at the end of the pass. On a GPU the caches have K and V
    /// afterwards, which `uses` declares.
    pub fn norm_qkv_rope(
        &self,
        l: usize,
        layer: &Layer,
        rows: &mut Rows,
        position: impl Fn(usize) -> usize,
        mut not_finite: impl FnMut(usize),
        uses: impl FnOnce(&mut Uses),
    ) {
        if let (Some(gpu), Some(model)) = (self.device.gpu(), self.gpu) {
            let _operation = self.device.operation("norm_qkv_rope", uses);
            return rows.gpu.norm_qkv_rope(gpu, model, self.config, l);
        }
        let _operation = self.device.operation("norm_qkv_rope", |_| {});
        let Rows { n, x, normed, q, k, v, cos, sin, .. } = rows;
        let Dense { device, config, rope, path, .. } = *self;
        if let Some(first) = norm::rms_norm(device.isa(), x, *n, &layer.input_norm, config.rms_norm_eps, normed) {
            // Rare: which of the rows from there on are bad?
            let row = |row: usize| &x[row * config.hidden_size..][..config.hidden_size];
            let bad = |&i: &usize| !row(i).iter().all(|v| (v * v).is_finite());
            (first..*n).filter(bad).for_each(&mut not_finite);
        }
        let mut parts = [
            Part { linear: &layer.q, out: &mut q[..] },
            Part { linear: &layer.k, out: &mut k[..] },
            Part { linear: &layer.v, out: &mut v[..] },
        ];
        project(device.isa(), path, normed, *n, &mut parts);
        for (heads, weight) in [(&mut *q, &layer.q_norm), (&mut *k, &layer.k_norm)] {
            if let Some(weight) = weight {
                heads.chunks_exact_mut(config.head_dim).for_each(|head| norm_head(head, weight, config.rms_norm_eps));
            }
        }
        for row in 0..*n {
            rope.angles(position(row), cos, sin);
            for heads in [&mut *q, &mut *k] {
                let width = heads.len() / *n;
                heads[row * width..][..width].chunks_exact_mut(config.head_dim).for_each(|head| rotate(head, cos, sin));
            }
        }
    }

    /// `x += W_o attn`.
    pub fn out_residual(&self, l: usize, layer: &Layer, rows: &mut Rows) {
        let _operation = self.device.operation("out_residual", |_| {});
        if let (Some(gpu), Some(model)) = (self.device.gpu(), self.gpu) {
            return rows.gpu.out_residual(gpu, model, self.config, l);
        }
        project_add(self.device.isa(), self.path, &rows.attn, rows.n, &layer.o, &mut rows.x);
    }

    /// RMS norm, then `silu(W_gate x) * W_up x`.
    pub fn norm_gate_up(&self, l: usize, layer: &Layer, rows: &mut Rows) {
        let _operation = self.device.operation("norm_gate_up", |_| {});
        if let (Some(gpu), Some(model)) = (self.device.gpu(), self.gpu) {
            return rows.gpu.norm_gate_up(gpu, model, self.config, l);
        }
        let Rows { n, x, normed, mlp, .. } = rows;
        norm::rms_norm(self.device.isa(), x, *n, &layer.post_norm, self.config.rms_norm_eps, normed);
        swiglu(self.device.isa(), self.path, normed, *n, &layer.gate, &layer.up, mlp);
    }

    /// `x += W_down mlp`.
    pub fn down_residual(&self, l: usize, layer: &Layer, rows: &mut Rows) {
        let _operation = self.device.operation("down_residual", |_| {});
        if let (Some(gpu), Some(model)) = (self.device.gpu(), self.gpu) {
            return rows.gpu.down_residual(gpu, model, self.config, l);
        }
        project_add(self.device.isa(), self.path, &rows.mlp, rows.n, &layer.down, &mut rows.x);
    }
}

/// RMS norm of one head in place.
fn norm_head(head: &mut [f32], weight: &[f32], eps: f32) {
    let mean = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    head.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
}

/// RoPE of one head in place, halves rotated against each other as Hugging Face has it.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = head.split_at_mut(cos.len());
    for i in 0..cos.len() {
        (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
    }
}

/// Final norm and LM head of `n` rows of x on the CPU device: `logits` is `[n, vocab]`.
pub fn norm_logits(device: &Device, model: &Model, x: &[f32], n: usize, normed: &mut Vec<f32>, logits: &mut [f32]) {
    let _operation = device.operation("norm_logits", |_| {});
    normed.resize(n * model.config.hidden_size, 0.0);
    let eps = model.config.rms_norm_eps;
    norm::rms_norm(device.isa(), x, n, &model.weights.final_norm, eps, normed);
    project(device.isa(), Path::Rows, normed, n, &mut [Part { linear: &model.weights.lm_head, out: logits }]);
}
