//! How many bytes the cache of one sequence takes: arithmetic only, before anything is allocated.

use super::counters::Counters;
use super::layout::KvShape;
use super::options::{KvMode, KvOptions, PAGE};
use super::prefetch::Slots;

/// Bytes that the cache of one sequence takes, by kind. Known before anything is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheBytes {
    /// Packed pages.
    pub packed: u64,
    /// Wide pages on the device: the residual, or everything in `full`.
    pub wide: u64,
    /// Prefetched pairs and their positions.
    pub slots: u64,
    /// Layers that come back whole (`offload`).
    pub loads: u64,
    /// Wide pages on the host.
    pub host: u64,
}

impl CacheBytes {
    /// Bytes on the device while decoding.
    pub fn device(&self) -> u64 {
        [self.packed, self.wide, self.slots, self.loads].into_iter().fold(0, u64::saturating_add)
    }

    /// Bytes on the device that only the prefill of a context of `n` tokens needs, while it lasts.
    pub fn prefill_scratch(shape: &KvShape, options: &KvOptions, n: usize) -> u64 {
        wide_page_bytes(shape).saturating_mul(prefill_pages(options, n) as u64)
    }

    /// Bytes that the cache takes on a GPU besides: lists of its pages, and which positions are not read low-bit.
    pub fn gpu_tables(shape: &KvShape, options: &KvOptions, capacity: usize) -> u64 {
        let lists = metered((shape.n_layers * 2 * list_room(capacity) * 8) as u64);
        let offloadable = page_counts(options, capacity).0;
        let skip = if options.mode.fetches() { metered((shape.n_kv_heads * offloadable * 8) as u64) } else { 0 };
        lists.saturating_add(skip.saturating_mul(shape.n_layers as u64))
    }

    /// Bytes of the cache that the attention of a decode step behind `n` tokens reads at least: packed or wide pages up to the
    /// residual, the residual, and prefetched pairs. (`fetch` reads its packed pages twice.)
    pub fn step_reads(shape: &KvShape, options: &KvOptions, n: usize) -> u64 {
        let mut counters = Counters::new(options);
        counters.after_prefill(n);
        let pairs = |tokens: usize| (tokens * shape.n_kv_heads * shape.pair_bytes()) as u64;
        let far = if options.mode.low_bit() {
            (counters.nq / PAGE * shape.packed_page_bytes()) as u64
        } else {
            pairs(counters.nq)
        };
        let selected = if options.mode.fetches() { slots_per_head(options, counters.nq / PAGE) } else { 0 };
        shape.n_layers as u64 * (far + pairs(n - counters.nq) + pairs(selected))
    }

    /// The plan for a sequence of at most `capacity` tokens. Saturates where no machine could follow.
    pub fn plan(shape: &KvShape, options: &KvOptions, capacity: usize) -> CacheBytes {
        let times = |n: usize, bytes: u64| bytes.saturating_mul(n as u64);
        let (offloadable, tail) = page_counts(options, capacity);
        let wide_page = wide_page_bytes(shape);
        let (mode, layers) = (options.mode, shape.n_layers);
        let slots = Slots::bytes(shape, slots_per_head(options, offloadable));
        let packed = metered(times(offloadable, shape.packed_page_bytes() as u64));
        CacheBytes {
            packed: if mode.low_bit() { times(layers, packed) } else { 0 },
            wide: times(layers, times(tail, wide_page)),
            slots: if mode.fetches() { times(layers, slots) } else { 0 },
            loads: if mode == KvMode::Offload { times(2 * offloadable, wide_page) } else { 0 },
            host: if mode.on_host() { times(layers, times(offloadable, wide_page)) } else { 0 },
        }
    }
}

/// Bytes that a meter counts for a wide page.
pub(super) fn wide_page_bytes(shape: &KvShape) -> u64 {
    shape.wide_page_bytes().next_multiple_of(64) as u64
}

/// What a device's meter counts for so many bytes: whole cache lines.
pub(super) fn metered(bytes: u64) -> u64 {
    bytes.saturating_add(63) / 64 * 64
}

/// Pages of each of the two lists that a layer has on a GPU: the tokens, and the rows of a step behind them.
pub(super) fn list_room(capacity: usize) -> usize {
    (capacity + 2).div_ceil(PAGE)
}

/// Slots of a KV head: never more than could be selected.
pub(super) fn slots_per_head(options: &KvOptions, offloadable: usize) -> usize {
    options.top_k.min(offloadable * PAGE)
}

/// The same for a sequence of at most `capacity` tokens.
pub(crate) fn top_k(options: &KvOptions, capacity: usize) -> usize {
    slots_per_head(options, page_counts(options, capacity).0)
}

/// Pages per layer of a sequence of at most `capacity` tokens: how many can be offloaded, and how many wide ones the
/// device holds. One more than the tail needs where pages are copied out, so that a step never waits for the copy of
/// the page that it is about to reuse.
pub(super) fn page_counts(options: &KvOptions, capacity: usize) -> (usize, usize) {
    let counters = Counters::new(options);
    // Decoding offloads a page at n - no >= R + P, so never more than a prefill of the same length.
    let offloadable = counters.offloaded_after_prefill(capacity);
    let spare = usize::from(options.mode.on_host());
    (offloadable / PAGE, counters.tail_pages(capacity) + spare)
}

/// Wide pages that the prefill of a context of `n` tokens needs beside those that stay: one layer is computed while the
/// copy stream still reads the one before.
pub(super) fn prefill_pages(options: &KvOptions, n: usize) -> usize {
    if options.mode == KvMode::Full { 0 } else { 2 * n.div_ceil(PAGE) }
}

/// Host pages of a sequence of at most `capacity` tokens, over all layers.
pub(super) fn host_pages(shape: &KvShape, options: &KvOptions, capacity: usize) -> usize {
    if options.mode.on_host() { shape.n_layers.saturating_mul(page_counts(options, capacity).0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    /// Llama-3-8B: 8 KV heads of 128, 32 layers; 2 bits in groups of 64 are 80 bytes a pair, 16 bits 512.
    #[test]
    fn a_step_reads_what_lies_on_the_device() {
        let config = synthetic::config("llama-3-8b").unwrap();
        let reads = |mode| {
            let options = KvOptions { mode, ..KvOptions::default() };
            CacheBytes::step_reads(&KvShape::new(&config, &options), &options, 1000)
        };
        // R = 64: 896 tokens are offloaded, 104 are not; k = 64.
        let heads = 32 * 8;
        assert_eq!(reads(KvMode::Full), heads * 1000 * 512);
        assert_eq!(reads(KvMode::Offload), heads * 1000 * 512);
        assert_eq!(reads(KvMode::Kivi), heads * (896 * 80 + 104 * 512));
        assert_eq!(reads(KvMode::SpeCache), heads * (896 * 80 + (104 + 64) * 512));
    }
}
