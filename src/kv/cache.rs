//! The cache of one sequence over all layers, and how pages change their place in it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::counters::Counters;
use super::host::{HostLayer, WidePage, page_in, page_out};
use super::layout::KvShape;
use super::options::{KvMode, KvOptions, PAGE};
use super::prefetch::Prefetch;
use crate::device::{Buffer, Device, Grants, InFlight};
use crate::error::Result;
use crate::ops;

/// One layer of a sequence's cache.
pub struct LayerCache {
    /// Wide pages on the device from position `nq` on: the residual, with room for the rows of this step.
    pub tail: Vec<WidePage>,
    /// Packed pages `[pages][n_kv_heads][head_bytes]`; empty in modes without a low-bit copy.
    pub packed: Buffer,
    /// The 16-bit copy, in modes that have one.
    pub host: Option<Arc<HostLayer>>,
    /// Prefetched pairs; no slots in modes that do not fetch.
    pub prefetch: Prefetch,
}

/// The cache of one sequence.
pub struct Cache {
    /// Shape of pages.
    pub shape: KvShape,
    /// How it is kept.
    pub options: KvOptions,
    /// Which tokens are where.
    pub counters: Counters,
    /// One entry a layer.
    pub layers: Vec<LayerCache>,
    device: Device,
    capacity: usize,
    /// Wide pages that no layer uses, the longest unused first: what the copy stream may still read is at the back.
    spare: VecDeque<WidePage>,
    /// `offload` only: two sets of pages that whole layers come back into, by turns.
    loads: [Load; 2],
    /// What waiting for the copy stream has cost since [`Cache::take_waited`].
    waited: Duration,
}

impl Drop for Cache {
    /// Page-outs still hold pages: whoever comes next is to find them free.
    fn drop(&mut self) {
        if self.options.mode.on_host() {
            self.device.copy_stream().drain();
        }
    }
}

/// A set of device pages that a layer's host pages are loaded into.
#[derive(Default)]
struct Load {
    pages: Vec<WidePage>,
    in_flight: Option<InFlight<Vec<WidePage>>>,
}

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

    /// The plan for a sequence of at most `capacity` tokens. Saturates where no machine could follow.
    pub fn plan(shape: &KvShape, options: &KvOptions, capacity: usize) -> CacheBytes {
        let line = |bytes: u64| bytes.saturating_add(63) / 64 * 64;
        let times = |n: usize, bytes: u64| bytes.saturating_mul(n as u64);
        let (offloadable, tail) = page_counts(options, capacity);
        let wide_page = wide_page_bytes(shape);
        let (mode, layers) = (options.mode, shape.n_layers);
        let pairs = shape.n_kv_heads * slots_per_head(options, offloadable);
        let slots = line(times(pairs, 4)).saturating_add(line(times(pairs, shape.pair_bytes() as u64)));
        let packed = line(times(offloadable, shape.packed_page_bytes() as u64));
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
fn wide_page_bytes(shape: &KvShape) -> u64 {
    shape.wide_page_bytes().next_multiple_of(64) as u64
}

/// Slots of a KV head: never more than could be selected.
fn slots_per_head(options: &KvOptions, offloadable: usize) -> usize {
    options.top_k.min(offloadable * PAGE)
}

/// Pages per layer of a sequence of at most `capacity` tokens: how many can be offloaded, and how many wide ones the
/// device holds. One more than the tail needs where pages are copied out, so that a step never waits for the copy of
/// the page that it is about to reuse.
fn page_counts(options: &KvOptions, capacity: usize) -> (usize, usize) {
    let counters = Counters::new(options);
    // Decoding offloads a page at n - no >= R + P, so never more than a prefill of the same length.
    let offloadable = counters.offloaded_after_prefill(capacity);
    let spare = usize::from(options.mode.on_host());
    (offloadable / PAGE, counters.tail_pages(capacity) + spare)
}

/// Wide pages that the prefill of a context of `n` tokens needs beside those that stay: one layer is computed while the
/// copy stream still reads the one before.
fn prefill_pages(options: &KvOptions, n: usize) -> usize {
    if options.mode == KvMode::Full { 0 } else { 2 * n.div_ceil(PAGE) }
}

impl Cache {
    /// An empty cache with room for `capacity` tokens; everything that decoding will need is allocated here. Room for the
    /// prefill of as many tokens is asked for too, but not kept.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] before anything is allocated if the plan does not fit.
    pub fn new(device: &Device, shape: KvShape, options: KvOptions, capacity: usize) -> Result<Cache> {
        let plan = CacheBytes::plan(&shape, &options, capacity);
        let prefill = CacheBytes::prefill_scratch(&shape, &options, capacity);
        let device_bytes = plan.device().saturating_add(prefill);
        let what = format!("the KV cache of {capacity} tokens ({prefill} bytes of it while they are prefilled)");
        let grants = &mut device.grant(device_bytes, plan.host, &what)?;
        let mut layers = Vec::with_capacity(shape.n_layers);
        for _ in 0..shape.n_layers {
            layers.push(LayerCache {
                tail: Vec::new(),
                packed: grants.device(0, "")?,
                host: options.mode.on_host().then(Arc::default),
                prefetch: Prefetch::new(grants, &shape)?,
            });
        }
        let (spare, loads, counters) = (VecDeque::new(), Default::default(), Counters::new(&options));
        let waited = Duration::default();
        let mut cache =
            Cache { shape, options, counters, layers, device: device.clone(), capacity: 0, spare, loads, waited };
        cache.grow(capacity, grants)?;
        Ok(cache)
    }

    /// Where it lives.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Tokens that it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes room for at least `capacity` tokens.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; nothing has changed then.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        let (device_bytes, host_bytes) = self.needs(capacity, 0);
        let mut grants = self.device.grant(device_bytes, host_bytes, "a longer KV cache")?;
        self.grow(capacity, &mut grants)
    }

    fn grow(&mut self, capacity: usize, grants: &mut Grants) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let shape = self.shape;
        let (offloadable, tail) = page_counts(&self.options, capacity);
        for layer in &mut self.layers {
            let packed_bytes = offloadable * shape.packed_page_bytes();
            if self.options.mode.low_bit() && layer.packed.len() < packed_bytes {
                let mut grown = grants.device(packed_bytes, "packed KV pages")?;
                grown.bytes_mut()[..layer.packed.len()].copy_from_slice(layer.packed.bytes());
                layer.packed = grown;
            }
            if let Some(host) = &layer.host {
                host.reserve(grants, &shape, offloadable)?;
            }
            if self.options.mode.fetches() {
                layer.prefetch.reserve(grants, &shape, slots_per_head(&self.options, offloadable))?;
            }
        }
        self.top_up_spare(tail * shape.n_layers, grants)?;
        if self.options.mode == KvMode::Offload {
            for load in &mut self.loads {
                while load.pages.len() < offloadable {
                    load.pages.push(Arc::new(grants.device(shape.wide_page_bytes(), "layers that come back")?));
                }
            }
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Bytes that this cache holds now.
    pub fn bytes(&self) -> CacheBytes {
        let wide = |n: usize| n as u64 * self.shape.wide_page_bytes().next_multiple_of(64) as u64;
        CacheBytes {
            packed: self.layers.iter().map(|l| l.packed.metered_bytes()).sum(),
            wide: wide(self.wide_pages()),
            slots: self.layers.iter().map(|l| l.prefetch.metered_bytes()).sum(),
            loads: wide(self.loads.iter().map(|l| l.pages.len()).sum()),
            host: self.layers.iter().flat_map(|l| &l.host).map(|h| h.bytes()).sum(),
        }
    }

    fn wide_pages(&self) -> usize {
        self.spare.len() + self.layers.iter().map(|l| l.tail.len()).sum::<usize>()
    }

    /// Makes sure that spare and tail pages together are at least `total`.
    fn top_up_spare(&mut self, total: usize, grants: &mut Grants) -> Result<()> {
        for _ in self.wide_pages()..total {
            let page = grants.device(self.shape.wide_page_bytes(), "wide KV pages")?;
            self.spare.push_front(Arc::new(page));
        }
        Ok(())
    }

    /// Takes a page that nobody else reads any more, waiting for the copy stream if it must.
    fn take_spare(&mut self) -> WidePage {
        let mut page = self.spare.pop_front().expect("pages were reserved for this many tokens");
        while Arc::get_mut(&mut page).is_none() {
            self.waited += self.device.copy_stream().drain();
        }
        page
    }

    /// Rounds K and V of one row to 16 bits and writes them at `position` of `layer`. The counters do not move: a
    /// speculative row's pair lies one position behind the real one's and is overwritten in the next step.
    ///
    /// `k`, `v`: `[n_kv_heads, head_dim]`, K after RoPE.
    pub fn write(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let page = position / PAGE - self.counters.nq / PAGE;
        while self.layers[layer].tail.len() <= page {
            let fresh = self.take_spare();
            self.layers[layer].tail.push(fresh);
        }
        let page = Arc::get_mut(&mut self.layers[layer].tail[page]).expect("an incomplete page has one owner");
        ops::kv::write_pairs(&self.device, &self.shape, page, position % PAGE, k, v);
    }

    /// The end of a decode step: the counters move, and a page that counts as offloaded from now on is packed and sent
    /// to the host in every layer. Returns the bytes sent.
    pub fn advance(&mut self) -> u64 {
        let before = self.counters;
        let offloaded = self.counters.advance();
        if self.counters.nq > before.nq {
            for layer in &mut self.layers {
                self.spare.push_back(layer.tail.remove(0));
            }
        }
        let Some(page) = offloaded else { return 0 };
        let in_tail = page - self.counters.nq / PAGE;
        (0..self.shape.n_layers).map(|l| self.offload(l, page, self.layers[l].tail[in_tail..=in_tail].to_vec())).sum()
    }

    /// Packs complete wide pages, beginning with page `first`, and sends them to the host. Returns the bytes sent.
    fn offload(&mut self, layer: usize, first: usize, pages: Vec<WidePage>) -> u64 {
        let layer = &mut self.layers[layer];
        if self.options.mode.low_bit() {
            ops::pack::pack_pages(&self.device, &self.shape, &pages, first, &mut layer.packed);
        }
        let Some(host) = &layer.host else { return 0 };
        let bytes = pages.iter().map(|p| p.len() as u64).sum();
        page_out(&self.device, host, first, pages);
        bytes
    }

    /// Wide pages of a prefill up to `n` tokens: those of a cache with room for `capacity`, and those that two layers need
    /// while they are computed (one is written while the copy stream still reads the other).
    fn prefill_wide_pages(&self, n: usize, capacity: usize) -> usize {
        self.layers.len() * page_counts(&self.options, capacity).1 + prefill_pages(&self.options, n)
    }

    /// Bytes on the device and on the host, beyond those held now, that room for `capacity` tokens takes, and the prefill
    /// of a context of `prefill` tokens beside it.
    fn needs(&self, capacity: usize, prefill: usize) -> (u64, u64) {
        let capacity = capacity.max(self.capacity);
        let (held, plan) = (self.bytes(), CacheBytes::plan(&self.shape, &self.options, capacity));
        let wide = wide_page_bytes(&self.shape).saturating_mul(self.prefill_wide_pages(prefill, capacity) as u64);
        // What grows exists twice for a moment, a layer at a time.
        let layers = self.layers.len() as u64;
        let moving = |new: u64, old: u64| if new > old { old / layers } else { 0 };
        let moving = moving(plan.packed, held.packed) + moving(plan.slots, held.slots);
        let device = CacheBytes { wide: wide.max(held.wide), ..plan }.device().saturating_add(moving);
        (device.saturating_sub(held.device()), plan.host.saturating_sub(held.host))
    }

    /// Bytes on the device and on the host that [`Cache::begin_prefill`] takes beyond those held now.
    pub fn prefill_needs(&self, n: usize) -> (u64, u64) {
        self.needs(n, n)
    }

    /// Starts the prefill of more tokens, up to `n` in all: makes room, and takes working pages.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; never if [`Cache::prefill_needs`] was granted.
    pub fn begin_prefill(&mut self, n: usize, grants: &mut Grants) -> Result<()> {
        for layer in &mut self.layers {
            layer.prefetch.arrive(&mut self.waited);
        }
        self.grow(n, grants)?;
        self.top_up_spare(self.prefill_wide_pages(n, self.capacity), grants)
    }

    /// The device pages of one layer for a prefill up to `n` tokens: all that the new tokens must see at 16 bits and all
    /// that they will fill. In modes with a host copy they begin at position 0 and the offloaded ones come back from
    /// there; in `kivi` they begin at `nq`. Give them back with [`Cache::settle_prefill`].
    pub fn prefill_pages(&mut self, layer: usize, n: usize) -> Vec<WidePage> {
        let mut pages = Vec::with_capacity(n.div_ceil(PAGE));
        if let Some(host) = self.layers[layer].host.clone() {
            let loaded = (0..self.counters.nq / PAGE).map(|_| self.take_spare()).collect();
            pages = page_in(&self.device, &host, self.counters.nq, loaded).wait(&mut Duration::default());
        }
        pages.append(&mut self.layers[layer].tail);
        let wanted = n.div_ceil(PAGE) - self.prefill_first_page();
        self.spare.extend(pages.drain(wanted.min(pages.len())..)); // a page that only a speculative row had begun
        while pages.len() < wanted {
            pages.push(self.take_spare());
        }
        pages
    }

    /// Page that [`Cache::prefill_pages`] begins with.
    pub fn prefill_first_page(&self) -> usize {
        if self.options.mode.on_host() { 0 } else { self.counters.nq / PAGE }
    }

    /// Puts the pages of a prefilled layer where they belong: newly offloaded ones are packed and sent to the host, the
    /// residual becomes the tail, the rest is spare again. Returns the bytes sent.
    pub fn settle_prefill(&mut self, layer: usize, n: usize, mut pages: Vec<WidePage>) -> u64 {
        let first = self.prefill_first_page();
        let (old, new) = (self.counters.no / PAGE, self.counters.offloaded_after_prefill(n) / PAGE);
        self.layers[layer].tail = pages.split_off(new - first);
        let sent = if new > old { self.offload(layer, old, pages[old - first..].to_vec()) } else { 0 };
        self.spare.extend(pages);
        sent
    }

    /// The end of a prefill that brought the cache to `n` tokens: counters, and no selection is valid any more. Pages
    /// that only the prefill needed are freed.
    pub fn end_prefill(&mut self, n: usize) {
        self.counters.after_prefill(n);
        for layer in &mut self.layers {
            layer.prefetch.slots_mut().count = 0;
        }
        self.free_working_pages();
    }

    /// Frees the pages that only a prefill needs: at its end, or where it was given up.
    pub fn free_working_pages(&mut self) {
        let keep = self.prefill_wide_pages(0, self.capacity);
        while self.wide_pages() > keep && self.spare.pop_front().is_some() {}
    }

    /// Time that writes have waited for pages since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// `offload`: begins to bring `layer` back. Returns the bytes that this moves.
    pub fn begin_load(&mut self, layer: usize) -> u64 {
        let (Some(host), n) = (&self.layers[layer].host, self.counters.nq) else { return 0 };
        let load = &mut self.loads[layer % 2];
        load.in_flight = Some(page_in(&self.device, host, n, std::mem::take(&mut load.pages)));
        (n / PAGE * self.shape.wide_page_bytes()) as u64
    }

    /// `offload`: waits until `layer` is back.
    pub fn finish_load(&mut self, layer: usize, exposed: &mut Duration) {
        let load = &mut self.loads[layer % 2];
        if let Some(in_flight) = load.in_flight.take() {
            load.pages = in_flight.wait(exposed);
        }
    }

    /// The slots of `layer` and the host pages that fill them.
    ///
    /// # Panics
    /// In modes that do not fetch.
    pub fn fetching(&mut self, layer: usize) -> (&mut Prefetch, &Arc<HostLayer>) {
        let LayerCache { prefetch, host, .. } = &mut self.layers[layer];
        (prefetch, host.as_ref().expect("a mode that fetches has a host copy"))
    }

    /// What attention reads of `layer`, for rows that begin at `position`.
    pub fn view(&self, layer: usize, window: Option<usize>) -> super::view::KvView<'_> {
        use super::view::{Far, KvView};
        let cache = &self.layers[layer];
        let far = match self.options.mode {
            KvMode::Full => Far::None,
            KvMode::Offload => Far::Wide(&self.loads[layer % 2].pages),
            KvMode::Kivi | KvMode::Fetch | KvMode::SpeCache => Far::Packed(cache.packed.bytes()),
        };
        let slots = self.options.mode.fetches().then(|| cache.prefetch.slots());
        let replaced = slots.map(|s| super::view::Replaced {
            count: s.count,
            stride: s.top_k,
            positions: s.positions.as_slice(),
            pairs: s.pairs.bytes(),
        });
        KvView { shape: self.shape, split: self.counters.nq, far, tail: &cache.tail, replaced, window }
    }
}
