//! The arithmetic of decode attention: scores and values of one chunk of pages for a handful of query rows.
//!
//! Low-bit pages are never unpacked to memory. With `x = code * scale + zero`, a score is
//! `q . k = sum_c (q_c scale_c) code_c + q . zero`: the scale goes into q once per page and group, the zero is a bias,
//! and what is left per code is one multiply-add. Likewise `sum_t p_t v_t = sum_t (p_t scale_t) code_t + p . zero`.
#![allow(clippy::needless_range_loop)] // Indices say which query and vector.
#![allow(unsafe_op_in_unsafe_fn)] // As in `simd`: a block around each lane operation would say nothing.

use super::element::{Element, with_element};
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::kv::layout::PackedLayout;
use crate::kv::options::PAGE;
use crate::model::Dtype;

/// Query rows of one task, rows x G; 2 x 16 at most.
pub(crate) const MAX_QUERIES: usize = 32;

/// Memory of a task.
#[derive(Default)]
pub(crate) struct Temp {
    /// `[queries][D]`, scaled by `1 / sqrt(D)`.
    pub(crate) q: Vec<f32>,
    /// `[queries][D]` (scores) or `[queries][64]` (values): with a page's scales folded in.
    folded: Vec<f32>,
    /// `[queries][64]`: probabilities of a page without the replaced positions.
    pub(crate) p: Vec<f32>,
    /// Zeros and scales of one group, widened: `2 * max(D, 64)`.
    params: Vec<f32>,
}

impl Temp {
    /// Makes room for `queries` query rows of head_dim `d`.
    pub(crate) fn lay_out(&mut self, queries: usize, d: usize) {
        self.q.resize(queries * d, 0.0);
        self.folded.resize(queries * d.max(PAGE), 0.0);
        self.p.resize(queries * PAGE, 0.0);
        self.params.resize(2 * d.max(PAGE), 0.0);
    }
}

/// The first `tokens` pairs of one KV head of a wide page.
#[derive(Clone, Copy)]
pub(crate) struct Wide<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) tokens: usize,
    pub(crate) d: usize,
    pub(crate) dtype: Dtype,
}

/// `bits!(layout.bits, BITS => call)`: the call with the number of bits as a constant.
macro_rules! bits {
    ($bits:expr, $BITS:ident => $call:expr) => {
        match $bits {
            1 => {
                const $BITS: usize = 1;
                $call
            }
            2 => {
                const $BITS: usize = 2;
                $call
            }
            _ => {
                const $BITS: usize = 4;
                $call
            }
        }
    };
}

/// Scores of all queries (`temp.q`) against one head of a packed page: `scores[query * stride + token]`.
pub(crate) fn score_packed(
    isa: Isa,
    layout: &PackedLayout,
    bytes: &[u8],
    queries: usize,
    temp: &mut Temp,
    scores: &mut [f32],
    stride: usize,
) {
    bits!(layout.bits, BITS => {
        // SAFETY: `bytes` is one head of a page of this layout, and the chunk has laid `temp` out for it.
        dispatch!(isa, S => unsafe { score_codes::<S, BITS>(layout, bytes, queries, temp, scores, stride) })
    });
}

/// `partial[query] += sum_t p[query][t] v_t` over one head of a packed page, with `temp.p` as the probabilities.
pub(crate) fn mix_packed(
    isa: Isa,
    layout: &PackedLayout,
    bytes: &[u8],
    queries: usize,
    temp: &mut Temp,
    partial: &mut [f32],
) {
    bits!(layout.bits, BITS => {
        // SAFETY: as in `score_packed`.
        dispatch!(isa, S => unsafe { mix_codes::<S, BITS>(layout, bytes, queries, temp, partial) })
    });
}

/// Scores of all queries against wide pairs: `scores[query * stride + token]`.
pub(crate) fn score_wide(isa: Isa, wide: Wide, queries: usize, q: &[f32], scores: &mut [f32], stride: usize) {
    with_element!(wide.dtype, E => {
        // SAFETY: E is the number type; the kernel asserts the lengths.
        dispatch!(isa, S => unsafe { score_pairs::<S, E>(wide, queries, q, scores, stride) })
    });
}

/// `partial[query] += sum_t p[query * stride + t] v_t` over wide pairs.
pub(crate) fn mix_wide(isa: Isa, wide: Wide, queries: usize, p: &[f32], stride: usize, partial: &mut [f32]) {
    with_element!(wide.dtype, E => {
        // SAFETY: E is the number type; the kernel asserts the lengths.
        dispatch!(isa, S => unsafe { mix_pairs::<S, E>(wide, queries, p, stride, partial) })
    });
}

/// Turns scores into `e^(s - max)` where they are visible and 0 elsewhere. Returns max and sum; `(-inf, 0)` if nothing is
/// visible. The length of `scores` is a multiple of 16.
pub(crate) fn softmax(isa: Isa, scores: &mut [f32], visible: std::ops::Range<usize>) -> (f32, f32) {
    // SAFETY: `dispatch!` switches on the features of S; whole pages are a multiple of 16.
    dispatch!(isa, S => unsafe { softmax_lanes::<S>(scores, visible) })
}

/// See [`softmax`].
///
/// # Safety
/// The features of `S`; `visible` is inside of `scores`, whose length is a multiple of 16.
#[inline(always)]
unsafe fn softmax_lanes<S: Simd>(scores: &mut [f32], visible: std::ops::Range<usize>) -> (f32, f32) {
    if visible.is_empty() {
        scores.fill(0.0);
        return (f32::NEG_INFINITY, 0.0);
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let mut max = S::splat(f32::NEG_INFINITY);
    for s in scores.chunks_exact(LANES) {
        max = S::max(max, S::load(s.as_ptr()));
    }
    let max = S::reduce_max(max);
    let (shift, mut sum) = (S::splat(max), S::zero());
    for s in scores.chunks_exact_mut(LANES) {
        let p = S::exp(S::sub(S::load(s.as_ptr()), shift));
        S::store(s.as_mut_ptr(), p);
        sum = S::add(sum, p);
    }
    (max, S::sum(sum))
}

/// Runs `$f::<.., T>(first query, ..)` over all queries in tiles of 8, 4, 2 and 1: the queries of a tile share every
/// load and every expansion of codes.
macro_rules! tiles {
    ($queries:expr, $at:ident, $T:ident => $call:expr) => {{
        let mut $at = 0;
        while $at < $queries {
            match $queries - $at {
                8.. => {
                    const $T: usize = 8;
                    $call;
                    $at += $T;
                }
                4..8 => {
                    const $T: usize = 4;
                    $call;
                    $at += $T;
                }
                2..4 => {
                    const $T: usize = 2;
                    $call;
                    $at += $T;
                }
                _ => {
                    const $T: usize = 1;
                    $call;
                    $at += $T;
                }
            }
        }
    }};
}

/// Widens `n` fp16 numbers; `n` is a multiple of 32 (zeros and scales come by D or 64).
///
/// # Safety
/// The features of `S`; `from` holds `2 n` bytes.
#[inline(always)]
unsafe fn widen_f16<S: Simd>(from: &[u8], to: &mut [f32]) {
    for (f, t) in from.chunks_exact(2 * LANES).zip(to.chunks_exact_mut(LANES)) {
        S::store(t.as_mut_ptr(), S::load_f16(f.as_ptr()));
    }
}

/// `(sum_i a_i b_i, a_i := a_i c_i into to)` in one pass over a multiple of 16 numbers.
///
/// # Safety
/// The features of `S`; all slices have the same length.
#[inline(always)]
unsafe fn fold<S: Simd>(a: &[f32], b: &[f32], c: &[f32], to: &mut [f32]) -> f32 {
    let mut dot = S::zero();
    for i in (0..a.len()).step_by(LANES) {
        let x = S::load(a.as_ptr().add(i));
        dot = S::fma(x, S::load(b.as_ptr().add(i)), dot);
        S::store(to.as_mut_ptr().add(i), S::mul(x, S::load(c.as_ptr().add(i))));
    }
    S::sum(dot)
}

/// Folds the scales of one group into every row of `n` numbers, and gives each row's product with the zeros.
///
/// # Safety
/// The features of `S`; `params` holds `n` zeros and `n` scales in fp16, `n` a multiple of 32.
#[inline(always)]
unsafe fn fold_group<S: Simd>(
    params: &[u8],
    n: usize,
    rows: &[f32],
    widened: &mut [f32],
    folded: &mut [f32],
    bias: &mut [f32],
) {
    widen_f16::<S>(params, widened);
    let (zero, scale) = widened.split_at(n);
    for ((row, to), bias) in rows.chunks_exact(n).zip(folded.chunks_exact_mut(n)).zip(bias) {
        *bias = fold::<S>(row, zero, &scale[..n], to);
    }
}

/// See [`score_packed`].
///
/// # Safety
/// The features of `S`; `bytes` is one head of a page of this layout; `temp` is laid out for it.
#[inline(always)]
unsafe fn score_codes<S: Simd, const BITS: usize>(
    layout: &PackedLayout,
    bytes: &[u8],
    queries: usize,
    temp: &mut Temp,
    scores: &mut [f32],
    stride: usize,
) {
    let (d, g) = (layout.head_dim, layout.group_size);
    let codes = &bytes[layout.k_codes()];
    let mut bias = [0f32; MAX_QUERIES];
    for (group, params) in bytes[layout.k_params()].chunks_exact(4 * d).enumerate() {
        fold_group::<S>(params, d, &temp.q[..queries * d], &mut temp.params, &mut temp.folded, &mut bias);
        for block in group * g / 32..(group + 1) * g / 32 {
            let codes = codes.as_ptr().add(block * 4 * BITS);
            tiles!(queries, at, T => {
                let folded = temp.folded[at * d..].as_ptr();
                let to = scores[at * stride + block * 32..].as_mut_ptr();
                multiply_codes::<S, BITS, T>(codes, d, 8 * BITS, folded, d, &bias[at..at + T], to, stride)
            });
        }
    }
}

/// `to[i * to_stride + 0..32] = bias[i] + sum_j by[i * by_stride + j] * codes of block j`, for `T` rows i and `n` blocks
/// that lie `step` bytes apart.
///
/// # Safety
/// The features of `S`; all pointers are good for what the formula reads and writes.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // Two strided operands, as in any matrix product.
unsafe fn multiply_codes<S: Simd, const BITS: usize, const T: usize>(
    codes: *const u8,
    n: usize,
    step: usize,
    by: *const f32,
    by_stride: usize,
    bias: &[f32],
    to: *mut f32,
    to_stride: usize,
) {
    let mut acc = [(S::zero(), S::zero()); T];
    for i in 0..T {
        acc[i] = (S::splat(bias[i]), S::splat(bias[i]));
    }
    for j in 0..n {
        let (lo, hi) = S::codes::<BITS>(codes.add(j * step));
        for i in 0..T {
            let x = S::splat(*by.add(i * by_stride + j));
            acc[i] = (S::fma(x, lo, acc[i].0), S::fma(x, hi, acc[i].1));
        }
    }
    for i in 0..T {
        S::store(to.add(i * to_stride), acc[i].0);
        S::store(to.add(i * to_stride + LANES), acc[i].1);
    }
}

/// See [`score_wide`].
///
/// # Safety
/// The features of `S`; `E` is the number type of the pairs.
#[inline(always)]
unsafe fn score_pairs<S: Simd, E: Element>(wide: Wide, queries: usize, q: &[f32], scores: &mut [f32], stride: usize) {
    let Wide { bytes, tokens, d, .. } = wide;
    assert!(bytes.len() >= tokens * 2 * d * E::BYTES);
    for token in 0..tokens {
        let k = bytes.as_ptr().add(token * 2 * d * E::BYTES);
        tiles!(queries, at, T => {
            let dots = dots::<S, E, T>(k, d, q[at * d..].as_ptr());
            for i in 0..T {
                scores[(at + i) * stride + token] = dots[i];
            }
        });
    }
}

/// `q_i . k` for `T` rows of q.
///
/// # Safety
/// The features of `S`; `k` holds `d` numbers, `q` `T * d`.
#[inline(always)]
unsafe fn dots<S: Simd, E: Element, const T: usize>(k: *const u8, d: usize, q: *const f32) -> [f32; T] {
    let mut acc = [S::zero(); T];
    let whole = d / LANES * LANES;
    for c in (0..whole).step_by(LANES) {
        let k = E::load::<S>(k.add(c * E::BYTES));
        for i in 0..T {
            acc[i] = S::fma(k, S::load(q.add(i * d + c)), acc[i]);
        }
    }
    if whole < d {
        let k = E::load_n::<S>(k.add(whole * E::BYTES), d - whole);
        for i in 0..T {
            acc[i] = S::fma(k, S::load_n(q.add(i * d + whole), d - whole), acc[i]);
        }
    }
    let mut dots = [0f32; T];
    for i in 0..T {
        dots[i] = S::sum(acc[i]);
    }
    dots
}

/// See [`mix_packed`].
///
/// # Safety
/// As [`score_codes`].
#[inline(always)]
unsafe fn mix_codes<S: Simd, const BITS: usize>(
    layout: &PackedLayout,
    bytes: &[u8],
    queries: usize,
    temp: &mut Temp,
    partial: &mut [f32],
) {
    let (d, g) = (layout.head_dim, layout.group_size);
    let codes = &bytes[layout.v_codes()];
    let step = d / 32 * 4 * BITS;
    let mut bias = [0f32; MAX_QUERIES];
    let mut mixed = [0f32; 8 * 32];
    for (group, params) in bytes[layout.v_params()].chunks_exact(4 * PAGE).enumerate() {
        fold_group::<S>(params, PAGE, &temp.p[..queries * PAGE], &mut temp.params, &mut temp.folded, &mut bias);
        for block in group * g / 32..(group + 1) * g / 32 {
            let codes = codes.as_ptr().add(block * 4 * BITS);
            tiles!(queries, at, T => {
                let folded = temp.folded[at * PAGE..].as_ptr();
                let bias = &bias[at..at + T];
                multiply_codes::<S, BITS, T>(codes, PAGE, step, folded, PAGE, bias, mixed.as_mut_ptr(), 32);
                for i in 0..T {
                    let to = partial[(at + i) * d + block * 32..][..32].as_mut_ptr();
                    for c in [0, LANES] {
                        let from = S::load(mixed.as_ptr().add(i * 32 + c));
                        S::store(to.add(c), S::add(S::load(to.add(c)), from));
                    }
                }
            });
        }
    }
}

/// See [`mix_wide`].
///
/// # Safety
/// As [`score_pairs`].
#[inline(always)]
unsafe fn mix_pairs<S: Simd, E: Element>(wide: Wide, queries: usize, p: &[f32], stride: usize, partial: &mut [f32]) {
    let Wide { bytes, tokens, d, .. } = wide;
    assert!(bytes.len() >= tokens * 2 * d * E::BYTES && p.len() >= (queries - 1) * stride + tokens);
    assert!(partial.len() >= queries * d);
    let v = bytes.as_ptr().add(d * E::BYTES);
    let step = 2 * d * E::BYTES;
    tiles!(queries, at, T => {
        let (p, to) = (p.as_ptr().add(at * stride), partial.as_mut_ptr().add(at * d));
        let mut c = 0;
        while c + 2 * LANES <= d {
            mix_columns::<S, E, T, 2>(v.add(c * E::BYTES), step, tokens, p, stride, to.add(c), d);
            c += 2 * LANES;
        }
        if c + LANES <= d {
            mix_columns::<S, E, T, 1>(v.add(c * E::BYTES), step, tokens, p, stride, to.add(c), d);
            c += LANES;
        }
        if c < d {
            mix_rest::<S, E, T>(v.add(c * E::BYTES), step, tokens, p, stride, to.add(c), d, d - c);
        }
    });
}

/// [`mix_pairs`] for the last `n < 16` channels of a head_dim that is no multiple of 16.
///
/// # Safety
/// As [`mix_pairs`].
#[inline(always)]
#[allow(clippy::too_many_arguments)] // As `mix_columns`, with a count of channels.
unsafe fn mix_rest<S: Simd, E: Element, const T: usize>(
    v: *const u8,
    step: usize,
    tokens: usize,
    p: *const f32,
    p_stride: usize,
    to: *mut f32,
    to_stride: usize,
    n: usize,
) {
    let mut acc = [S::zero(); T];
    for i in 0..T {
        acc[i] = S::load_n(to.add(i * to_stride), n);
    }
    for t in 0..tokens {
        let lanes = E::load_n::<S>(v.add(t * step), n);
        for i in 0..T {
            acc[i] = S::fma(S::splat(*p.add(i * p_stride + t)), lanes, acc[i]);
        }
    }
    for i in 0..T {
        S::store_n(to.add(i * to_stride), acc[i], n);
    }
}

/// [`mix_pairs`] for `W` vectors of channels and `T` rows.
///
/// # Safety
/// As [`mix_pairs`].
#[inline(always)]
unsafe fn mix_columns<S: Simd, E: Element, const T: usize, const W: usize>(
    v: *const u8,
    step: usize,
    tokens: usize,
    p: *const f32,
    p_stride: usize,
    to: *mut f32,
    to_stride: usize,
) {
    let mut acc = [[S::zero(); W]; T];
    for t in 0..tokens {
        let mut lanes = [S::zero(); W];
        for w in 0..W {
            lanes[w] = E::load::<S>(v.add(t * step + w * LANES * E::BYTES));
        }
        for i in 0..T {
            let x = S::splat(*p.add(i * p_stride + t));
            for w in 0..W {
                acc[i][w] = S::fma(x, lanes[w], acc[i][w]);
            }
        }
    }
    for i in 0..T {
        for w in 0..W {
            let at = to.add(i * to_stride + w * LANES);
            S::store(at, S::add(S::load(at), acc[i][w]));
        }
    }
}
