//! Prefill attention on the CPU: online softmax over blocks of keys, the products by the `gemm` crate.
//!
//! A task is one KV head and a tile of query rows; all G query heads of the tile are the rows of one product, so each
//! block of K and V is widened once for G x 64 queries.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::disjoint::Disjoint;
use super::pack::unpack_head;
use super::simd::{Isa, LANES, Simd, dispatch};
use crate::kv::options::PAGE;
use crate::kv::view::PrefillView;
use crate::model::weights::widen;

/// Query rows of a tile.
const TILE: usize = 64;
/// Pages of a block of keys: 256 x 128 f32 of K and of V are 256 KiB and stay in a 1 MiB L2.
const BLOCK_PAGES: usize = 4;
const BLOCK: usize = BLOCK_PAGES * PAGE;

#[derive(Default)]
struct Temp {
    /// `[G * rows, D]`, scaled.
    q: Vec<f32>,
    /// `[G * rows, D]`.
    out: Vec<f32>,
    /// `[G * rows, BLOCK]`.
    scores: Vec<f32>,
    /// `[BLOCK, D]` each.
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[64, 2 D]`: one page, widened.
    pairs: Vec<f32>,
    /// `[G * rows]` running maximum and sum.
    max: Vec<f32>,
    sum: Vec<f32>,
}

thread_local! {
    static TEMP: RefCell<Temp> = RefCell::default();
}

/// See [`crate::ops::attn_prefill::attend`], which has checked the shapes.
pub(crate) fn attend(
    isa: Isa,
    n_heads: usize,
    view: &PrefillView,
    position: usize,
    rows: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let d = view.shape.head_dim;
    let group_heads = n_heads / view.shape.n_kv_heads;
    let out = Disjoint::new(out);
    let tiles = rows.div_ceil(TILE);
    (0..view.shape.n_kv_heads * tiles).into_par_iter().for_each(|task| {
        let (head, tile) = (task / tiles, task % tiles);
        let tile = tile * TILE..rows.min((tile + 1) * TILE);
        let index = |row: usize, g: usize| (row * n_heads + head * group_heads + g) * d;
        TEMP.with_borrow_mut(|temp| {
            let queries = group_heads * tile.len();
            temp.load_queries(q, d, group_heads, tile.clone(), index);
            temp.max[..queries].fill(f32::NEG_INFINITY);
            temp.sum[..queries].fill(0.0);
            temp.out[..queries * d].fill(0.0);
            temp.attend_tile(isa, view, head, position + tile.start, tile.len(), group_heads);
            for (i, row) in tile.enumerate() {
                for g in 0..group_heads {
                    let query = i * group_heads + g;
                    // SAFETY: a task is alone with its KV head's columns of its rows.
                    let to = unsafe { out.part(index(row, g)..index(row, g) + d) };
                    let by = 1.0 / temp.sum[query];
                    to.iter_mut().zip(&temp.out[query * d..]).for_each(|(t, f)| *t = f * by);
                }
            }
        });
    });
}

impl Temp {
    /// Queries of the tile as rows `i * G + g`, scaled by `1 / sqrt(D)`.
    fn load_queries(
        &mut self,
        q: &[f32],
        d: usize,
        group_heads: usize,
        tile: Range<usize>,
        index: impl Fn(usize, usize) -> usize,
    ) {
        let queries = group_heads * tile.len();
        for (buffer, len) in [
            (&mut self.q, queries * d),
            (&mut self.out, queries * d),
            (&mut self.scores, queries * BLOCK),
            (&mut self.k, BLOCK * d),
            (&mut self.v, BLOCK * d),
            (&mut self.pairs, PAGE * 2 * d),
            (&mut self.max, queries),
            (&mut self.sum, queries),
        ] {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        }
        let scale = 1.0 / (d as f32).sqrt();
        for (i, row) in tile.enumerate() {
            for g in 0..group_heads {
                let to = &mut self.q[(i * group_heads + g) * d..][..d];
                to.iter_mut().zip(&q[index(row, g)..]).for_each(|(t, f)| *t = f * scale);
            }
        }
    }

    fn attend_tile(
        &mut self,
        isa: Isa,
        view: &PrefillView,
        head: usize,
        position: usize,
        rows: usize,
        group_heads: usize,
    ) {
        let d = view.shape.head_dim;
        let queries = rows * group_heads;
        let lowest = view.window.map_or(0, |w| (position + 1).saturating_sub(w)) / BLOCK * BLOCK;
        for start in (lowest..position + rows).step_by(BLOCK) {
            let keys = (position + rows - start).min(BLOCK);
            self.load_block(view, head, start, keys);
            // S = Q K^T
            product(queries, keys, d, &mut self.scores, BLOCK, &self.q, d, &self.k, (1, d), false);
            for query in 0..queries {
                let at = position + query / group_heads;
                let hidden = view.window.map_or(0, |w| (at + 1).saturating_sub(w));
                let local = |p: usize| p.saturating_sub(start).min(keys);
                let visible = local(hidden)..local(at + 1);
                let scores = &mut self.scores[query * BLOCK..][..BLOCK];
                let out = &mut self.out[query * d..][..d];
                let state = (&mut self.max[query], &mut self.sum[query]);
                // SAFETY: `dispatch!` switches on the features of S; a block has a multiple of 16 scores.
                dispatch!(isa, S => unsafe { online_softmax::<S>(scores, visible, state, out) });
            }
            // O += P V
            product(queries, d, keys, &mut self.out, d, &self.scores, BLOCK, &self.v, (d, 1), true);
        }
    }

    /// Widens K and V of the positions `start .. start + keys`; `start` is a multiple of the page.
    fn load_block(&mut self, view: &PrefillView, head: usize, start: usize, keys: usize) {
        let d = view.shape.head_dim;
        for (i, page) in (start / PAGE..(start + keys).div_ceil(PAGE)).enumerate() {
            let (k, v) = (&mut self.k[i * PAGE * d..][..PAGE * d], &mut self.v[i * PAGE * d..][..PAGE * d]);
            let Some(wide) = page.checked_sub(view.first_page) else {
                unpack_head(&view.shape.packed, &view.packed.bytes()[view.shape.packed_head(page, head)], k, v);
                continue;
            };
            let tokens = (keys - i * PAGE).min(PAGE);
            let bytes =
                &view.pages[wide].bytes()[view.shape.pair(head, 0).start..view.shape.pair(head, tokens - 1).end];
            let pairs = &mut self.pairs[..tokens * 2 * d];
            widen(view.shape.dtype, bytes, pairs);
            for (token, pair) in pairs.chunks_exact(2 * d).enumerate() {
                k[token * d..][..d].copy_from_slice(&pair[..d]);
                v[token * d..][..d].copy_from_slice(&pair[d..]);
            }
        }
    }
}

/// `to[m, n] (+)= a[m, k] b[k, n]`, `a` and `to` row-major with the given row strides, `b` with (row, column) strides.
#[allow(clippy::too_many_arguments)] // As in every matrix product.
fn product(
    m: usize,
    n: usize,
    k: usize,
    to: &mut [f32],
    to_stride: usize,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    b_strides: (usize, usize),
    add: bool,
) {
    assert!(to.len() >= (m - 1) * to_stride + n && a.len() >= (m - 1) * a_stride + k, "product: rows");
    assert!(b.len() > (k - 1) * b_strides.0 + (n - 1) * b_strides.1, "product: b");
    // SAFETY: the three operands are as large as the strides and counts say (asserted), and `to` is held mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.as_mut_ptr(),
            1,
            to_stride as isize,
            add,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            b_strides.1 as isize,
            b_strides.0 as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// One block of a query's scores: turns them into `e^(s - max)`, 0 where hidden, and rescales what was summed before to
/// the new maximum.
///
/// # Safety
/// The features of `S`; the length of `scores` is a multiple of 16.
#[allow(unsafe_op_in_unsafe_fn)]
#[inline(always)]
unsafe fn online_softmax<S: Simd>(
    scores: &mut [f32],
    visible: Range<usize>,
    (max, sum): (&mut f32, &mut f32),
    out: &mut [f32],
) {
    if visible.is_empty() {
        scores.fill(0.0);
        return;
    }
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let mut high = S::splat(f32::NEG_INFINITY);
    for s in scores.chunks_exact(LANES) {
        high = S::max(high, S::load(s.as_ptr()));
    }
    let new_max = max.max(S::reduce_max(high));
    if new_max > *max {
        let by = (*max - new_max).exp();
        *sum *= by;
        out.iter_mut().for_each(|o| *o *= by);
        *max = new_max;
    }
    let (shift, mut total) = (S::splat(new_max), S::zero());
    for s in scores.chunks_exact_mut(LANES) {
        let p = S::exp(S::sub(S::load(s.as_ptr()), shift));
        S::store(s.as_mut_ptr(), p);
        total = S::add(total, p);
    }
    *sum += S::sum(total);
}
