//! Exact top-k of mean probabilities, one task per KV head.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Isa;
use super::attn_decode::Scratch;

thread_local! {
    static TEMP: RefCell<Temp> = RefCell::default();
}

#[derive(Default)]
struct Temp {
    /// Sum over the query heads, per candidate. The mean's order is the sum's.
    probs: Vec<f32>,
    /// `!probability bits << 32 | position`: ascending keys are descending probabilities, ties to the lower position.
    keys: Vec<u64>,
}

impl Temp {
    /// The `count` best candidates of one KV head, in no order.
    fn top_k(
        &mut self,
        scratch: &Scratch,
        seq: usize,
        head: usize,
        queries: Range<usize>,
        candidates: Range<usize>,
        count: usize,
    ) -> &mut [u64] {
        let head = scratch.head_probs(seq, head);
        self.probs.clear();
        self.keys.clear();
        self.probs.reserve(head.room);
        self.keys.reserve(head.room);
        self.probs.resize(candidates.len(), 0.0);
        head.add_to(queries, candidates.clone(), &mut self.probs);
        // Probabilities are not negative, so their bits are ordered as they are; NaN (a request that will fail) sorts
        // first and harms nobody.
        let key = |(p, position): (&f32, usize)| u64::from(!p.to_bits()) << 32 | position as u64;
        self.keys.extend(self.probs.iter().zip(candidates).map(key));
        if count < self.keys.len() {
            self.keys.select_nth_unstable(count - 1);
        }
        &mut self.keys[..count]
    }
}

/// See [`crate::ops::select::select`]. `positions`: `[n_kv_heads, top_k]`.
#[allow(clippy::too_many_arguments)] // One call site, which names them all.
pub(crate) fn select(
    _isa: Isa,
    scratch: &Scratch,
    seq: usize,
    queries: Range<usize>,
    candidates: Range<usize>,
    positions: &mut [u32],
    top_k: usize,
    count: usize,
) {
    let one = |(head, to): (usize, &mut [u32])| {
        TEMP.with_borrow_mut(|temp| {
            let keys = temp.top_k(scratch, seq, head, queries.clone(), candidates.clone(), count);
            keys.iter().zip(&mut *to).for_each(|(&key, to)| *to = key as u32);
            to[..count].sort_unstable();
        });
    };
    // A few hundred candidates cost less than waking a thread for them.
    if candidates.len() < 512 {
        positions.chunks_exact_mut(top_k).enumerate().for_each(one);
    } else {
        positions.par_chunks_exact_mut(top_k).enumerate().for_each(one);
    }
}

/// See [`crate::ops::select::hits`].
pub(crate) fn hits<'a>(
    scratch: &Scratch,
    seq: usize,
    queries: Range<usize>,
    candidates: Range<usize>,
    count: usize,
    n_kv_heads: usize,
    selected: impl Fn(usize) -> &'a [u32] + Sync,
) -> u64 {
    let one = |head: usize| {
        TEMP.with_borrow_mut(|temp| {
            let keys = temp.top_k(scratch, seq, head, queries.clone(), candidates.clone(), count);
            keys.iter().filter(|&&key| selected(head).binary_search(&(key as u32)).is_ok()).count() as u64
        })
    };
    if candidates.len() < 512 { (0..n_kv_heads).map(one).sum() } else { (0..n_kv_heads).into_par_iter().map(one).sum() }
}
