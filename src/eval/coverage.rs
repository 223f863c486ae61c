//! How few keys hold the attention, and whether the right ones were fetched.
//!
//! Two questions about every decode step, layer by layer, both answered by the probabilities of a `full` session that is
//! fed the same tokens. *Coverage*: the smallest share of the keys that a query head sees which holds 90 % of its
//! attention (the paper: 0.5 % on PG19). *True hit rate*: of the k pairs that the real token would choose by its 16-bit
//! attention, how many had been fetched? Both sessions stand at the same token, and `full` is the same in every row.

use std::ops::Range;

use super::divergence::with_full;
use super::lockstep::{self, Step};
use crate::engine::Engine;
use crate::error::Result;
use crate::kv::KvOptions;
use crate::session::Attention;

/// The share of attention that coverage asks for.
pub const MASS: f64 = 0.9;

/// Sums over the steps of one window, for one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layer {
    /// Share of the seen keys that hold [`MASS`], summed over steps and query heads.
    pub share: f64,
    /// How many keys that are, summed likewise.
    pub keys: f64,
    /// Steps times query heads.
    pub of: u64,
    /// For each variant.
    pub hits: Vec<Hits>,
}

/// How well a variant has chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hits {
    /// Pairs of the true top-k that had been fetched.
    pub hits: u64,
    /// Pairs of the true top-k.
    pub of: u64,
    /// Attention on the fetched pairs over attention on the true top-k, summed over steps and KV heads.
    pub ratio: f64,
    /// Terms of that sum.
    pub ratio_of: u64,
}

impl Layer {
    /// Adds another window's sums.
    pub fn add(&mut self, other: &Layer) {
        self.share += other.share;
        self.keys += other.keys;
        self.of += other.of;
        self.hits.resize(other.hits.len(), Hits::default());
        for (to, from) in self.hits.iter_mut().zip(&other.hits) {
            to.hits += from.hits;
            to.of += from.of;
            to.ratio += from.ratio;
            to.ratio_of += from.ratio_of;
        }
    }
}

/// One window: a `full` session beside one for each of `variants`, which must be modes that fetch. Gives each layer's sums.
/// `progress` gets the number of each step.
///
/// # Errors
/// As [`lockstep::run`] and [`crate::Session::keep_attention`]: the CPU device only.
pub fn window(
    engine: &Engine,
    variants: &[KvOptions],
    ids: &[u32],
    prefill: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Layer>> {
    let config = &engine.model().config;
    let empty = Layer { hits: vec![Hits::default(); variants.len()], ..Layer::default() };
    let mut layers = vec![empty; config.n_layers];
    lockstep::run(engine, &with_full(variants), ids, prefill, true, |step: Step| {
        let kept = |session: usize| step.sessions[session].attention().expect("it is watched");
        for (l, layer) in layers.iter_mut().enumerate() {
            let full = &kept(0)[l];
            count_keys(full, layer);
            for (i, kv) in variants.iter().enumerate() {
                count_hits(full, &kept(i + 1)[l], config.group_heads(), kv.top_k, &mut layer.hits[i]);
            }
        }
        progress(step.number);
        Ok(())
    })?;
    Ok(layers)
}

fn count_keys(full: &Attention, layer: &mut Layer) {
    let seen = full.seen.len();
    for head in full.probabilities.chunks_exact(seen) {
        let keys = keys_that_hold(head, MASS);
        layer.keys += keys as f64;
        layer.share += keys as f64 / seen as f64;
        layer.of += 1;
    }
}

/// The least number of entries of `probabilities` (which sum to 1) that hold `mass` together. All of them, where rounding
/// keeps their sum below it.
pub fn keys_that_hold(probabilities: &[f32], mass: f64) -> usize {
    let mut rest = probabilities.to_vec();
    let (mut held, mut counted, mut block) = (0.0, 0, 64);
    // Few keys hold most of the attention, so the largest 64 are sorted, then the next 512, ...
    while counted < probabilities.len() {
        let left = &mut rest[counted..];
        let n = block.min(left.len());
        let descending = |a: &f32, b: &f32| b.total_cmp(a);
        if n < left.len() {
            left.select_nth_unstable_by(n - 1, descending);
        }
        left[..n].sort_unstable_by(descending);
        for (i, &p) in left[..n].iter().enumerate() {
            held += f64::from(p);
            if held >= mass {
                return counted + i + 1;
            }
        }
        (counted, block) = (counted + n, block * 8);
    }
    counted
}

/// What of the true top-k was fetched, over all KV heads of a layer. Candidates are what the variant reads low-bit: the rest
/// is at 16 bits anyway.
fn count_hits(full: &Attention, variant: &Attention, group_heads: usize, k: usize, sum: &mut Hits) {
    let candidates = variant.low_bit.clone();
    if candidates.is_empty() || k == 0 {
        return;
    }
    let mut scores = Vec::new();
    for (kv_head, fetched) in variant.fetched.iter().enumerate() {
        mean_attention(full, kv_head, group_heads, candidates.clone(), &mut scores);
        let best = top_k(&scores, k);
        let score = |position: u32| f64::from(scores[position as usize - candidates.start]);
        // What has slid out of the window since it was chosen counts nothing.
        let fetched: Vec<u32> = fetched.iter().copied().filter(|&p| candidates.contains(&(p as usize))).collect();
        let is_fetched = |&i: &usize| fetched.binary_search(&((i + candidates.start) as u32)).is_ok();
        sum.hits += best.iter().filter(|i| is_fetched(i)).count() as u64;
        sum.of += best.len() as u64;
        let true_mass: f64 = best.iter().map(|&i| f64::from(scores[i])).sum();
        if true_mass > 0.0 {
            sum.ratio += fetched.iter().map(|&p| score(p)).sum::<f64>() / true_mass;
            sum.ratio_of += 1;
        }
    }
}

/// The mean over a KV head's query heads of the probabilities at `positions`.
fn mean_attention(full: &Attention, kv_head: usize, group_heads: usize, positions: Range<usize>, out: &mut Vec<f32>) {
    let seen = full.seen.len();
    let within = positions.start - full.seen.start..positions.end - full.seen.start;
    out.clear();
    out.resize(within.len(), 0.0);
    for head in kv_head * group_heads..(kv_head + 1) * group_heads {
        let probabilities = &full.probabilities[head * seen..(head + 1) * seen][within.clone()];
        out.iter_mut().zip(probabilities).for_each(|(sum, p)| *sum += p / group_heads as f32);
    }
}

/// The indices of the `k` largest scores, in no order; ties to the lower index, as the engine selects.
fn top_k(scores: &[f32], k: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..scores.len()).collect();
    let order = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    if k < all.len() {
        all.select_nth_unstable_by(k - 1, order);
        all.truncate(k);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_by_hand() {
        let p = [0.05, 0.5, 0.15, 0.3];
        for (mass, keys) in [(0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (0.96, 4), (2.0, 4)] {
            // 0.5 + 0.3 in f32 is a little above 0.8.
            assert_eq!(keys_that_hold(&p, mass), keys, "{mass}");
        }
        // More than one block: of 1,000 equal ones, 900 hold nine tenths (901 where their sum is rounded down).
        assert!((900..=901).contains(&keys_that_hold(&[0.001; 1000], 0.9)));
    }

    /// Two query heads share a KV head; their mean over the candidates 0 .. 4 is .20 .35 .05 .20 .
    #[test]
    fn hits_by_hand() {
        let full = Attention {
            seen: 0..5,
            probabilities: [[0.3, 0.3, 0.0, 0.2, 0.2], [0.1, 0.4, 0.1, 0.2, 0.2]].concat(),
            ..Attention::default()
        };
        let variant = |fetched: &[u32]| Attention { low_bit: 0..4, fetched: vec![fetched.to_vec()], ..full.clone() };
        let hits = |fetched: &[u32], k| {
            let mut sum = Hits::default();
            count_hits(&full, &variant(fetched), 2, k, &mut sum);
            sum
        };
        // The true top-2 are 1 and 0: 0 and 3 tie, the lower position wins.
        let sum = hits(&[1, 2], 2);
        assert_eq!((sum.hits, sum.of, sum.ratio_of), (1, 2, 1));
        assert!((sum.ratio - 0.4 / 0.55).abs() < 1e-6, "{}", sum.ratio);
        assert_eq!(hits(&[0, 1], 2).hits, 2);
        assert_eq!(hits(&[0, 1, 2, 3], 64), Hits { hits: 4, of: 4, ratio: hits(&[0, 1, 2, 3], 64).ratio, ratio_of: 1 });
        // Nothing was fetched: nothing is hit, and that counts. Nothing is low-bit: there is no question.
        assert_eq!((hits(&[], 2).hits, hits(&[], 2).of), (0, 2));
        let mut sum = Hits::default();
        count_hits(&full, &Attention { low_bit: 0..0, ..variant(&[]) }, 2, 2, &mut sum);
        assert_eq!(sum, Hits::default());
    }
}
