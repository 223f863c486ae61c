//! The oracle: every op of the engine, and a whole teacher-forced decode, in plain f32.
//!
//! Written for the eye, not for speed: one thread, `Vec<f32>`, nothing packed, nothing shared with the fast code but
//! the model's types. Tests compare every fast op, and the engine as a whole, with what stands here. Where a formula
//! has a source other than the design's method page (a paper, Hugging Face transformers), the item names it.
//!
//! This file holds the ops; `decode` strings them together to a model.

mod decode;

pub use decode::{Run, Session, greedy, teacher_forced};

use half::{bf16, f16};

use crate::kv::PAGE;
use crate::model::{Dtype, Linear, Matrix, Rope, RopeScaling};

/// The inner product of two vectors of one length.
///
/// Eight partial sums instead of one: the error grows with `len / 8`, and the loop does not wait for each addition.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths");
    let mut sums = [0.0f32; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (x, y) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + rest
}

/// The embedding of token `id`: row `id` of `table`, `[hidden]`.
pub fn embed(table: &Matrix, id: u32) -> Vec<f32> {
    let mut x = vec![0.0; table.cols()];
    table.row_f32(id as usize, &mut x);
    x
}

/// `x / sqrt(mean(x^2) + eps) * weight` over one row; `x`, `weight` and the result are `[width]`.
///
/// Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; epsilon inside the root as in Llama.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), weight.len(), "rms_norm: lengths");
    let mean_square = dot(x, x) / x.len() as f32;
    let inv_rms = 1.0 / (mean_square + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * inv_rms * w).collect()
}

/// `y = W x + b` for each row: `x` is `[rows, in_features]`, the result `[rows, out_features]`.
pub fn linear(layer: &Linear, x: &[f32]) -> Vec<f32> {
    let (n_out, n_in) = (layer.weight.rows(), layer.weight.cols());
    assert!(x.len().is_multiple_of(n_in), "linear: {} numbers are not rows of {n_in}", x.len());
    let mut y = vec![0.0; x.len() / n_in * n_out];
    let mut w = vec![0.0; n_in];
    for out in 0..n_out {
        layer.weight.row_f32(out, &mut w);
        let bias = layer.bias.as_ref().map_or(0.0, |b| b[out]);
        for (row, x) in x.chunks_exact(n_in).enumerate() {
            y[row * n_out + out] = dot(&w, x) + bias;
        }
    }
    y
}

/// `silu(gate) * up`, element by element, with `silu(x) = x / (1 + exp(-x))`.
///
/// Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU).
pub fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "silu_mul: lengths");
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// The RoPE frequencies `[head_dim / 2]`: `theta^(-2i / head_dim)`, stretched as `rope.scaling` says.
///
/// Formulas and f32 arithmetic of `modeling_rope_utils.py` in Hugging Face transformers. Models were trained with those
/// f32 frequencies, and at position 300 the last bit of one is visible: with frequencies rounded once from f64 the
/// recall model's logits move by 1e-4.
pub fn rope_inv_freq(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let wave = |i: usize| (rope.theta as f32).powf((2 * i) as f32 / head_dim as f32);
    let base = |i: usize| 1.0 / wave(i);
    let scaled = |i: usize| match rope.scaling {
        // `Dynamic` differs only beyond max_position_embeddings, where it is refused.
        RopeScaling::Default | RopeScaling::Dynamic { .. } => base(i),
        RopeScaling::Linear { factor } => base(i) / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let turns = original_max_positions as f32 / (std::f32::consts::TAU / base(i));
            // 0: fewer turns than low_freq_factor, stretched in full. 1: more than high_freq_factor, kept.
            let kept = (turns - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
            let kept = kept.clamp(0.0, 1.0);
            (1.0 - kept) * base(i) / factor as f32 + kept * base(i)
        }
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, truncate, .. } => {
            // The (fractional) dimension that makes `turns` turns within the original context.
            let dim_of = |turns: f64| {
                head_dim as f64 * (original_max_positions as f64 / (turns * std::f64::consts::TAU)).ln()
                    / (2.0 * rope.theta.ln())
            };
            let (low, high) = (dim_of(beta_fast), dim_of(beta_slow));
            let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, mut high) = (low.max(0.0), high.min((head_dim - 1) as f64));
            if low == high {
                high += 0.001; // Hugging Face's guard against 0 / 0
            }
            let stretched = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - stretched;
            (1.0 / (factor as f32 * wave(i))) * (1.0 - kept) + base(i) * kept
        }
    };
    (0..head_dim / 2).map(scaled).collect()
}

/// Cosines and sines `[head_dim / 2]` of the angles `position * inv_freq` (an f32 product), times YaRN's attention
/// factor where there is one.
pub fn rope_cos_sin(rope: &Rope, head_dim: usize, position: usize) -> (Vec<f32>, Vec<f32>) {
    let factor = match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
        _ => 1.0,
    };
    let angle = |inv_freq: f32| position as f32 * inv_freq;
    rope_inv_freq(rope, head_dim).into_iter().map(|f| (angle(f).cos() * factor, angle(f).sin() * factor)).unzip()
}

/// Rotates one head `[head_dim]` in place; number i pairs with number `i + head_dim / 2` (rotate-half).
///
/// Su et al., "RoFormer", 2021, in Hugging Face's order of the dimensions.
pub fn rope_rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = x.split_at_mut(cos.len());
    for i in 0..cos.len() {
        let (a, b) = (first[i], second[i]);
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}

/// Rounds one number of K or V to `dtype` (to nearest, ties to even) and widens it again.
pub fn round_kv(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// One group of g values at low precision: `x' = code * scale + zero`.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// `[g]`, each in `0 ..= 2^bits - 1`, not packed.
    pub codes: Vec<u8>,
    /// What code 0 stands for; an fp16 number.
    pub zero: f32,
    /// Distance of two levels; an fp16 number.
    pub scale: f32,
}

/// Quantises one group of values to `bits` bits.
///
/// From 2 bits on the levels span `min ..= max` (KIVI, Liu et al., 2024). With 1 bit they sit in the middle of the
/// lower and of the upper half of that range (SpeCache, Jie et al., 2025). `zero` and `scale` are rounded to fp16
/// before the codes are computed, so that the codes fit the numbers that are stored.
pub fn quantise_group(values: &[f32], bits: usize) -> Quantised {
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max_code = ((1 << bits) - 1) as f32;
    let (zero, scale) = match bits {
        1 => ((3.0 * min + max) / 4.0, (max - min) / 2.0),
        _ => (min, (max - min) / max_code),
    };
    let (zero, scale) = (f16::from_f32(zero).to_f32(), f16::from_f32(scale).to_f32());
    let code = |x: f32| match scale {
        0.0 => 0,
        _ => ((x - zero) / scale).round_ties_even().clamp(0.0, max_code) as u8,
    };
    Quantised { codes: values.iter().map(|&x| code(x)).collect(), zero, scale }
}

/// `code * scale + zero` for each code, two roundings (no fused multiply-add); `[g]`.
pub fn dequantise(group: &Quantised) -> Vec<f32> {
    group.codes.iter().map(|&code| f32::from(code) * group.scale + group.zero).collect()
}

/// The low-bit copy of a page of [`PAGE`] tokens of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedPage {
    /// `[PAGE / g][head_dim]`: groups of g tokens of one channel.
    pub k: Vec<Vec<Quantised>>,
    /// `[PAGE][head_dim / g]`: groups of g channels of one token.
    pub v: Vec<Vec<Quantised>>,
}

/// Quantises a page: K per channel over `group_size` tokens, V per token over `group_size` channels (KIVI: K has
/// outlier channels, V has none). `k` and `v` are `[PAGE][head_dim]`.
pub fn quantise_page(k: &[Vec<f32>], v: &[Vec<f32>], bits: usize, group_size: usize) -> QuantisedPage {
    assert!(k.len() == PAGE && v.len() == PAGE, "quantise_page: a page has {PAGE} tokens");
    assert!(v[0].len().is_multiple_of(group_size), "quantise_page: group size does not divide head_dim");
    let channel = |tokens: &[Vec<f32>], c: usize| tokens.iter().map(|row| row[c]).collect::<Vec<f32>>();
    QuantisedPage {
        k: k.chunks(group_size)
            .map(|tokens| (0..k[0].len()).map(|c| quantise_group(&channel(tokens, c), bits)).collect())
            .collect(),
        v: v.iter().map(|row| row.chunks(group_size).map(|group| quantise_group(group, bits)).collect()).collect(),
    }
}

/// K and V of a low-bit page as attention reads them, each `[PAGE][head_dim]`.
pub fn dequantise_page(page: &QuantisedPage) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let mut k = Vec::new();
    for channels in &page.k {
        let columns: Vec<Vec<f32>> = channels.iter().map(dequantise).collect();
        k.extend((0..columns[0].len()).map(|token| columns.iter().map(|column| column[token]).collect()));
    }
    let v = page.v.iter().map(|groups| groups.iter().flat_map(dequantise).collect()).collect();
    (k, v)
}

/// `exp(x - max) / sum`, `[n]`. Entries of minus infinity get 0.
pub fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// One cached token as attention reads it.
#[derive(Clone, Copy, Debug)]
pub struct Pair<'a> {
    /// Position in the sequence.
    pub position: usize,
    /// `[head_dim]`, after RoPE.
    pub k: &'a [f32],
    /// `[head_dim]`.
    pub v: &'a [f32],
}

/// Does the token at `query` see the one at `key`? Causal, and with a window w only `key > query - w`.
pub fn sees(query: usize, key: usize, window: Option<usize>) -> bool {
    key <= query && window.is_none_or(|w| key + w > query)
}

/// Attention of one query head `q` `[head_dim]` at `position` over `pairs`: output `[head_dim]`, and the
/// probabilities in the order of `pairs`, 0 for those that it does not [see](sees).
///
/// `softmax(q k / sqrt(head_dim)) v`, Vaswani et al., 2017.
pub fn attention(q: &[f32], position: usize, pairs: &[Pair], window: Option<usize>) -> (Vec<f32>, Vec<f32>) {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let score = |pair: &Pair| match sees(position, pair.position, window) {
        true => dot(q, pair.k) * scale,
        false => f32::NEG_INFINITY,
    };
    let probabilities = softmax(&pairs.iter().map(score).collect::<Vec<f32>>());
    let mut out = vec![0.0; q.len()];
    for (p, pair) in probabilities.iter().zip(pairs).filter(|(p, _)| **p > 0.0) {
        out.iter_mut().zip(pair.v).for_each(|(o, v)| *o += p * v);
    }
    (out, probabilities)
}

/// The mean over the G query heads of a KV head: `heads` is `[G][n]`, the result `[n]`.
pub fn mean_probabilities(heads: &[Vec<f32>]) -> Vec<f32> {
    let mut mean = vec![0.0; heads[0].len()];
    for head in heads {
        mean.iter_mut().zip(head).for_each(|(m, p)| *m += p);
    }
    mean.into_iter().map(|m| m / heads.len() as f32).collect()
}

/// The indices of the `min(k, n)` highest of `scores` `[n]`, ascending; of equal scores the lower index wins.
///
/// # Panics
/// On NaN.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let score = |i: u32| scores[i as usize];
    order.sort_by(|&a, &b| score(b).partial_cmp(&score(a)).expect("top_k: NaN").then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// The index of the highest of `logits` `[vocab]`; of equal ones the lowest.
pub fn argmax(logits: &[f32]) -> u32 {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// KL(p || q) in nats of the distributions that two rows of logits `[vocab]` stand for, in f64.
pub fn kl_divergence(p_logits: &[f32], q_logits: &[f32]) -> f64 {
    assert_eq!(p_logits.len(), q_logits.len(), "kl_divergence: lengths");
    let log_softmax = |x: &[f32]| -> Vec<f64> {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let log_sum = x.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln();
        x.iter().map(|&x| x as f64 - max - log_sum).collect()
    };
    let (p, q) = (log_softmax(p_logits), log_softmax(q_logits));
    // A token of probability 0 adds nothing, whatever q gives it.
    p.iter().zip(&q).filter(|(p, _)| p.exp() > 0.0).map(|(p, q)| p.exp() * (p - q)).sum()
}

#[cfg(test)]
mod tests;
