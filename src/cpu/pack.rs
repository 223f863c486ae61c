//! KIVI quantisation on the CPU: K per channel over g tokens, V per token over g channels (method.md, "The cache").

use std::cell::RefCell;

use half::f16;
use rayon::prelude::*;

use super::simd::codes::{block_bytes, pack_codes, unpack_codes};
use super::simd::{Isa, Simd, dispatch};
use crate::kv::host::WidePage;
use crate::kv::layout::{KvShape, PackedLayout};
use crate::kv::options::PAGE;
use crate::model::weights::widen;

/// See [`crate::ops::pack::pack_pages`]. `to`: packed pages, one for each of `pages`.
pub(crate) fn pack_pages(isa: Isa, shape: &KvShape, pages: &[WidePage], to: &mut [u8]) {
    let head_bytes = shape.packed.head_bytes();
    let one = |(i, to): (usize, &mut [u8])| {
        let (page, head) = (i / shape.n_kv_heads, i % shape.n_kv_heads);
        let from = &pages[page].bytes()[head * shape.wide_head_bytes()..][..shape.wide_head_bytes()];
        TEMP.with_borrow_mut(|temp| {
            temp.lay_out(shape.head_dim);
            dispatch!(isa, S => pack_head::<S>(shape, from, to, temp));
        });
    };
    if pages.len() * shape.n_kv_heads <= 2 {
        to.chunks_exact_mut(head_bytes).enumerate().for_each(one);
    } else {
        to.par_chunks_exact_mut(head_bytes).enumerate().for_each(one);
    }
}

thread_local! {
    static TEMP: RefCell<Temp> = RefCell::default();
}

/// A thread's memory for one head of a page.
#[derive(Default)]
struct Temp {
    /// `[64][K: D | V: D]`.
    pairs: Vec<f32>,
    /// One line: a channel's tokens, or a token's channels.
    values: Vec<f32>,
    codes: Vec<u8>,
}

impl Temp {
    fn lay_out(&mut self, head_dim: usize) {
        self.pairs.resize(PAGE * 2 * head_dim, 0.0);
        self.values.resize(head_dim.max(PAGE), 0.0);
        self.codes.resize(head_dim.max(PAGE), 0);
    }
}

/// Quantises one head of a page: `from` is `[64][K: D | V: D]`. Plain loops; `S` only decides what the compiler may use.
#[inline(always)]
fn pack_head<S: Simd>(shape: &KvShape, from: &[u8], to: &mut [u8], temp: &mut Temp) {
    let (layout, d) = (&shape.packed, shape.head_dim);
    let Temp { pairs, values, codes } = temp;
    widen(shape.dtype, from, pairs);
    pack_k(layout, |token, channel| pairs[token * 2 * d + channel], values, codes, to);
    pack_v(layout, |token, channel| pairs[token * 2 * d + d + channel], values, codes, to);
}

/// Zero, scale and codes of one group (method.md): both rounded to fp16 first, then a true division, rounded half to
/// even; code 0 where the scale is 0.
#[inline(always)]
fn quantise(bits: usize, values: &[f32], codes: &mut [u8]) -> (f16, f16) {
    let min = values.iter().copied().fold(f32::INFINITY, f32::min);
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let top = ((1u32 << bits) - 1) as f32;
    let (zero, scale) = match bits {
        1 => ((3.0 * min + max) / 4.0, (max - min) / 2.0),
        _ => (min, (max - min) / top),
    };
    let (zero, scale) = (f16::from_f32(zero), f16::from_f32(scale));
    // Beyond fp16 a level would be infinite, and a score of minus infinity would hide its tokens without a word. NaN
    // reaches the logits, and the request fails with the layer's name.
    let zero = if zero.is_finite() && scale.is_finite() { zero } else { f16::NAN };
    let (z, s) = (zero.to_f32(), scale.to_f32());
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = if s == 0.0 { 0 } else { ((x - z) / s).round_ties_even().clamp(0.0, top) as u8 };
    }
    (zero, scale)
}

#[inline(always)]
fn pack_k(
    layout: &PackedLayout,
    value: impl Fn(usize, usize) -> f32,
    values: &mut [f32],
    codes: &mut [u8],
    to: &mut [u8],
) {
    let PackedLayout { head_dim: d, bits, group_size: g } = *layout;
    let (values, codes) = (&mut values[..PAGE], &mut codes[..PAGE]);
    for channel in 0..d {
        for (token, v) in values.iter_mut().enumerate() {
            *v = value(token, channel);
        }
        for group in 0..PAGE / g {
            let tokens = group * g..(group + 1) * g;
            let (zero, scale) = quantise(bits, &values[tokens.clone()], &mut codes[tokens]);
            write_params(&mut to[layout.k_params()], d, group, channel, zero, scale);
        }
        write_codes(bits, codes, &mut to[layout.k_codes()], channel);
    }
}

#[inline(always)]
fn pack_v(
    layout: &PackedLayout,
    value: impl Fn(usize, usize) -> f32,
    values: &mut [f32],
    codes: &mut [u8],
    to: &mut [u8],
) {
    let PackedLayout { head_dim: d, bits, group_size: g } = *layout;
    let (values, codes) = (&mut values[..d], &mut codes[..d]);
    for token in 0..PAGE {
        for (channel, v) in values.iter_mut().enumerate() {
            *v = value(token, channel);
        }
        for group in 0..d / g {
            let channels = group * g..(group + 1) * g;
            let (zero, scale) = quantise(bits, &values[channels.clone()], &mut codes[channels]);
            write_params(&mut to[layout.v_params()], PAGE, group, token, zero, scale);
        }
        write_codes(bits, codes, &mut to[layout.v_codes()], token);
    }
}

/// Zero and scale number `i` of `n` in group `group`: `[group][zero: n, scale: n]`.
fn write_params(params: &mut [u8], n: usize, group: usize, i: usize, zero: f16, scale: f16) {
    let at = (group * 2 * n + i) * 2;
    params[at..at + 2].copy_from_slice(&zero.to_le_bytes());
    params[at + 2 * n..at + 2 * n + 2].copy_from_slice(&scale.to_le_bytes());
}

/// All codes of line `line`: blocks of 32, one after the other.
fn write_codes(bits: usize, codes: &[u8], to: &mut [u8], line: usize) {
    let block = block_bytes(bits);
    let at = line * codes.len() / 32 * block;
    for (codes, to) in codes.chunks_exact(32).zip(to[at..].chunks_exact_mut(block)) {
        pack_codes(bits, codes.try_into().expect("blocks of 32"), to);
    }
}

/// The low-bit copy of one head of a page as numbers: `k`, `v` are `[64][D]`. The plain inverse, for continued prefill
/// over a cache that has nothing better (`kivi`), and for tests.
pub(crate) fn unpack_head(layout: &PackedLayout, bytes: &[u8], k: &mut [f32], v: &mut [f32]) {
    let PackedLayout { head_dim: d, bits, group_size: g } = *layout;
    let block = block_bytes(bits);
    let number = |params: &[u8], at: usize| f16::from_le_bytes([params[2 * at], params[2 * at + 1]]).to_f32();
    let code = |codes: &[u8], line: usize, len: usize, i: usize| {
        let at = (line * len + i) / 32 * block;
        f32::from(unpack_codes(bits, &codes[at..at + block])[i % 32])
    };
    let (k_codes, k_params) = (&bytes[layout.k_codes()], &bytes[layout.k_params()]);
    let (v_codes, v_params) = (&bytes[layout.v_codes()], &bytes[layout.v_params()]);
    for token in 0..PAGE {
        for channel in 0..d {
            let at = token / g * 2 * d + channel;
            let (zero, scale) = (number(k_params, at), number(k_params, at + d));
            k[token * d + channel] = code(k_codes, channel, PAGE, token) * scale + zero;
            let at = channel / g * 2 * PAGE + token;
            let (zero, scale) = (number(v_params, at), number(v_params, at + PAGE));
            v[token * d + channel] = code(v_codes, token, d, channel) * scale + zero;
        }
    }
}
