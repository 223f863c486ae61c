//! The cache of one sequence over all layers, and how pages change their place in it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::counters::Counters;
use super::host::{Completion, HostLayer, PageIn, PageOut, WidePage};
use super::layout::KvShape;
use super::options::{KvMode, KvOptions, PAGE};
pub use super::plan::CacheBytes;
use super::plan::{host_pages, list_room, page_counts, prefill_pages, slots_per_head, top_k, wide_page_bytes};
use super::prefetch::Prefetch;
use super::slab::{PageRef, Reservation, Slab, UniquePage};
use super::tables::{List, Tables};
use super::view::{Far, KvView, Replaced};
use crate::device::cuda::bindings::abi::specache_layer_cache;
use crate::device::cuda::mailbox::Failure;
use crate::device::order::{Resource, Site, StreamId, Uses};
use crate::device::{Buffer, Device, Event, Grants, InFlight, Kind};
use crate::error::{Error, Result};
use crate::ops;

/// Where computation waits for prefetched pairs.
const ARRIVAL: Site = "pairs arrive before attention";
/// Where it waits for whole pages.
const LOADED: Site = "loaded pages arrive before attention";

/// One layer of a sequence's cache.
pub struct LayerCache {
    /// Wide pages on the device from position `nq` on: the residual, with room for the rows of this step.
    pub tail: Vec<WidePage>,
    /// Packed pages `[pages][n_kv_heads][head_bytes]`; empty in modes without a low-bit copy.
    pub packed: Buffer,
    /// The 16-bit copy, in modes that have one.
    pub host: Option<Arc<HostLayer>>,
    /// When its pages are there.
    completion: Completion,
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
    spare: VecDeque<Spare>,
    host: HostPages,
    /// `offload` only: two sets of pages that whole layers come back into, by turns.
    loads: Vec<Load>,
    /// What the kernels of a GPU know of it.
    tables: Option<Tables>,
    /// `[layer]`: pages of the tail that a prefill has packed, kept until it cannot be given up any more.
    packed_tail: Vec<Vec<WidePage>>,
    /// What waiting for the copy stream has cost since [`Cache::take_waited`].
    waited: Duration,
    /// Why copies have failed, if one has.
    failure: Option<String>,
    /// On a GPU whose pairs the host gathers: who says why the last ones could not be brought.
    pub(crate) gather_failure: Option<Failure>,
}

/// A wide page that no layer uses.
struct Spare {
    page: WidePage,
    /// When the copy stream has read it.
    free_after: Option<Event>,
}

/// The host pages of a sequence that are not in its tables, and the way into those.
struct HostPages {
    slab: Slab,
    /// All pages that it may ever need are its own or promised to it.
    promised: Reservation,
    /// Leased and not in use: a truncated sequence's.
    spare: Vec<UniquePage>,
    /// Pages that are in tables, on their way there, promised or spare.
    total: usize,
    page_out: Arc<PageOut>,
    /// When all pages that were sent are on the host.
    paged_out: Option<Event>,
}

/// A set of device pages that a layer's host pages are loaded into.
struct Load {
    pages: InFlight<Vec<WidePage>>,
    /// On a GPU: where they are, at rest or not.
    addresses: Vec<u64>,
    job: Arc<PageIn>,
    /// It is one of the next step's first layers that comes back, or has come. Forgotten when the cache comes to rest: what
    /// happens to it then may change what that step reads.
    is_ahead: bool,
}

impl Drop for Cache {
    /// Copies still hold pages: whoever comes next is to find them free.
    fn drop(&mut self) {
        self.come_to_rest();
        let _nobody_is_left_to_hear = self.device.sound();
    }
}

/// Memory that a cache has been granted: what of it is not used goes back when this is dropped.
pub struct Admission {
    device: Grants,
    host: Reservation,
}

impl Admission {
    /// Asks for bytes on the device and pages on the host, for all of which `what` is the reason.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; nothing is taken then.
    pub fn ask(device: &Device, slab: &Slab, bytes: u64, host_pages: usize, what: &str) -> Result<Admission> {
        let granted = device.grant_for(Kind::Kv, bytes, slab.missing_bytes(host_pages), what)?;
        Ok(Admission { device: granted, host: slab.reserve(host_pages)? })
    }

    /// What was granted on the device.
    pub(crate) fn device(&mut self) -> &mut Grants {
        &mut self.device
    }
}

impl Cache {
    /// An empty cache with room for `capacity` tokens; everything that decoding will need is allocated or promised here.
    /// Room for the prefill of as many tokens is asked for too, but not kept.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] before anything is allocated if the plan does not fit.
    pub fn new(device: &Device, slab: &Slab, shape: KvShape, options: KvOptions, capacity: usize) -> Result<Cache> {
        let plan = CacheBytes::plan(&shape, &options, capacity);
        let prefill = CacheBytes::prefill_scratch(&shape, &options, capacity);
        let device_bytes = plan.device().saturating_add(prefill);
        let what = format!("the KV cache of {capacity} tokens ({prefill} bytes of it while they are prefilled)");
        let pages = host_pages(&shape, &options, capacity);
        let mut admission = Admission::ask(device, slab, device_bytes, pages, &what)?;
        let mut cache = Cache::empty(device, slab, shape, options, &mut admission)?;
        cache.grow(capacity, &mut admission)?;
        Ok(cache)
    }

    /// A cache with room for nothing.
    fn empty(
        device: &Device,
        slab: &Slab,
        shape: KvShape,
        options: KvOptions,
        admission: &mut Admission,
    ) -> Result<Cache> {
        let grants = &mut admission.device;
        let mut layers = Vec::with_capacity(shape.n_layers);
        for _ in 0..shape.n_layers {
            layers.push(LayerCache {
                tail: Vec::new(),
                packed: grants.device(0, "")?,
                host: options.mode.on_host().then(|| Arc::new(HostLayer::new(slab, 0, [].into_iter()))),
                completion: Completion::default(),
                prefetch: Prefetch::new(grants, &shape)?,
            });
        }
        let load = || Load {
            pages: InFlight::new(Vec::new()),
            addresses: Vec::new(),
            job: PageIn::new(device),
            is_ahead: false,
        };
        Ok(Cache {
            packed_tail: vec![Vec::new(); shape.n_layers],
            shape,
            options,
            counters: Counters::new(&options),
            layers,
            device: device.clone(),
            capacity: 0,
            spare: VecDeque::new(),
            host: HostPages {
                slab: slab.clone(),
                promised: slab.nothing_reserved(),
                spare: Vec::new(),
                total: 0,
                page_out: PageOut::new(device),
                paged_out: None,
            },
            loads: if options.mode == KvMode::Offload { vec![load(), load()] } else { Vec::new() },
            tables: None,
            waited: Duration::default(),
            failure: None,
            gather_failure: None,
        })
    }

    /// A cache with the same tokens and as much room, which goes its own way from here. Complete host pages are shared;
    /// what lies on the device is copied.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; nothing has changed then.
    pub fn fork(&mut self) -> Result<Cache> {
        self.come_to_rest();
        let Cache { shape, options, capacity, .. } = *self;
        let tables = self.layers.iter().flat_map(|layer| &layer.host);
        let shared = tables.map(|table| table.pages().count()).sum::<usize>();
        let bytes = CacheBytes::plan(&shape, &options, capacity).device();
        let pages = host_pages(&shape, &options, capacity) - shared;
        let mut admission = Admission::ask(&self.device, &self.host.slab, bytes, pages, "a fork of a KV cache")?;
        let _fork = self.device.operation("fork", |uses| self.declare(uses));
        let mut fork = Cache::empty(&self.device, &self.host.slab, shape, options, &mut admission)?;
        for (to, from) in fork.layers.iter_mut().zip(&self.layers) {
            let table =
                |host: &Arc<HostLayer>| Arc::new(HostLayer::new(&self.host.slab, host.room(), host.pages().cloned()));
            to.host = from.host.as_ref().map(table);
        }
        fork.host.total = shared;
        fork.grow(capacity, &mut admission)?;
        fork.counters = self.counters;
        fork.gather_failure = self.gather_failure.clone();
        for (l, from) in self.layers.iter().enumerate() {
            for page in &from.tail {
                let mut copy = fork.take_spare();
                Arc::get_mut(&mut copy).expect("a new page has one owner").copy(0, page, 0..page.len());
                fork.layers[l].tail.push(copy);
            }
            let to = &mut fork.layers[l];
            // The same length, unless this cache was refused more room half way.
            to.packed.copy(0, &from.packed, 0..to.packed.len().min(from.packed.len()));
            to.prefetch.copy_from(&from.prefetch, &shape);
        }
        self.device.sound()?;
        Ok(fork)
    }

    /// Forgets all tokens from `n` on: the cache is as after a prefill of the first `n`, or, with 0, as a new one.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] in `kivi` (not with 0), where the 16-bit pairs that would become the residual are gone;
    /// [`crate::Error::OutOfMemory`] if host pages are shared with a fork and none are left to take their place. Nothing
    /// has changed then.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        let mut counters = Counters::new(&self.options);
        if n > 0 {
            counters.after_prefill(n);
        }
        if n > 0 && !self.options.mode.on_host() && counters.nq < self.counters.nq {
            let least = self.counters.nq + self.options.residual_len;
            return Err(Error::Usage(format!(
                "truncate to {n} tokens: --kv kivi keeps the tokens before {} in their low-bit form only; keep at least \
                 {least}, or use another mode",
                self.counters.nq
            )));
        }
        self.come_to_rest();
        let keep = counters.no / PAGE;
        let tables = self.layers.iter().flat_map(|layer| &layer.host);
        let shared = tables.flat_map(|table| table.pages().skip(keep)).filter(|page| !page.is_unique()).count();
        if shared > 0 {
            self.host.promised.extend(shared)?;
        }
        let mut lost = 0;
        for l in 0..self.layers.len() {
            self.truncate_tail(l, &counters, n.div_ceil(PAGE));
            lost += self.truncate_table(l, keep);
            if self.options.mode.fetches() {
                self.layers[l].prefetch.slots_mut().clear(true);
            }
        }
        self.gather_failure = None; // no pair that has come is read any more
        self.counters = counters;
        // A fork may have ended meanwhile on another thread, and left its pages to this cache.
        self.host.promised.give_up(shared - lost);
        self.check_device()
    }

    /// The tail of a layer becomes that of `counters`, up to page `end`: pages that lie low-bit on the device now and are
    /// wide then come back from the host.
    fn truncate_tail(&mut self, layer: usize, counters: &Counters, end: usize) {
        let (old, new) = (self.counters.nq / PAGE, counters.nq / PAGE);
        let mut tail = std::mem::take(&mut self.layers[layer].tail);
        let kept = end.saturating_sub(old).min(tail.len());
        tail.drain(kept..).for_each(|page| self.spare.push_back(Spare { page, free_after: None }));
        let packed = new.saturating_sub(old).min(tail.len());
        tail.drain(..packed).for_each(|page| self.spare.push_back(Spare { page, free_after: None }));
        if new < old.min(end) {
            let mut loaded = self.load(layer, new..old.min(end));
            loaded.append(&mut tail);
            tail = loaded;
        }
        self.layers[layer].tail = tail;
    }

    /// Leaves `keep` pages in the table of a layer. Those that nobody shares stay with this cache, to be used again.
    /// Returns how many are shared, and stay with others only.
    fn truncate_table(&mut self, layer: usize, keep: usize) -> usize {
        let Some(table) = self.layers[layer].host.take() else { return 0 };
        let dropped: Vec<PageRef> = table.pages().skip(keep).cloned().collect();
        let kept = HostLayer::new(&self.host.slab, table.room(), table.pages().take(keep).cloned());
        self.layers[layer].host = Some(Arc::new(kept));
        drop(table); // and its references with it
        let (n_dropped, n_spare) = (dropped.len(), self.host.spare.len());
        self.host.spare.extend(dropped.into_iter().filter_map(|page| page.try_into_unique().ok()));
        n_dropped - (self.host.spare.len() - n_spare)
    }

    /// Waits for all copies: afterwards everything is here, and held by nobody else.
    pub(crate) fn come_to_rest(&mut self) {
        self.device.enter();
        self.settle_copies_in(
            "prefetched pairs are here before a cache rests",
            "loaded pages are here before a cache rests",
        );
        if let Some(event) = self.host.paged_out {
            self.waited += self.device.wait(event, "pages are on the host before a cache rests");
        }
        self.layers.iter_mut().for_each(|layer| layer.completion = Completion::default());
        // On a GPU the calling thread has not waited yet, and what is freed next must not be in use.
        self.device.finish_compute();
        self.tables.iter_mut().for_each(Tables::outdate);
    }

    /// Waits for all that comes from the host. What had begun for the next step has to begin anew.
    fn settle_copies_in(&mut self, pairs: Site, pages: Site) {
        for l in 0..self.layers.len() {
            let arrived = self.layers[l].prefetch.arrive(&self.device, Some(pairs), &mut self.waited);
            self.note(arrived);
        }
        for i in 0..self.loads.len() {
            let load = &mut self.loads[i];
            load.is_ahead = false;
            let arrived = load.pages.arrive(&self.device, Some(pages), &mut self.waited);
            self.note(arrived);
        }
    }

    /// All that lies on the device and in the tables of host pages, as an operation that reads it.
    fn declare(&self, uses: &mut Uses) {
        for layer in &self.layers {
            uses.reads.extend(layer.tail.iter().map(|page| Resource::DevicePage(page.id())));
            let pages =
                layer.host.iter().flat_map(|table| (0..table.pages().count()).flat_map(|page| table.resource(page)));
            uses.reads.extend(pages);
            let slots = layer.prefetch.slots();
            uses.reads.extend([Resource::Selection(slots.positions.id()), Resource::Slots(slots.pairs.id())]);
        }
    }

    /// Keeps the first reason why a copy failed.
    fn note(&mut self, copied: std::result::Result<(), String>) {
        if let Err(why) = copied {
            self.failure.get_or_insert(why);
        }
    }

    /// Keeps why the GPU has failed, if it has: pairs may not have come to where they are looked for.
    pub(super) fn check_device(&mut self) -> Result<()> {
        let sound = self.device.sound();
        self.note(sound.as_ref().copied().map_err(ToString::to_string));
        sound
    }

    /// Why a copy has failed, if one has: then the cache does not hold what it should, and its sequence cannot go on.
    pub fn failure(&self) -> Option<&str> {
        // Pages that never came to the host are the reason why others could not come back from there.
        self.host.page_out.failure().or(self.failure.as_deref())
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
    /// [`crate::Error::OutOfMemory`]: tokens and room are as before then. Where the budgets had room and the system had
    /// no memory, the cache keeps what it was given before that, for the next attempt.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        let (device_bytes, host_pages) = self.needs(capacity, 0);
        let mut admission =
            Admission::ask(&self.device, &self.host.slab, device_bytes, host_pages, "a longer KV cache")?;
        self.grow(capacity, &mut admission)
    }

    fn grow(&mut self, capacity: usize, admission: &mut Admission) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let grown = self.grow_to(capacity, admission);
        if let Err(Error::Device(why)) = &grown {
            self.note(Err(why.clone()));
        }
        grown.and_then(|()| self.check_device())
    }

    fn grow_to(&mut self, capacity: usize, admission: &mut Admission) -> Result<()> {
        self.come_to_rest();
        let device = self.device.clone();
        let _grow = device.operation("grow", |uses| self.declare(uses));
        let shape = self.shape;
        let (offloadable, tail) = page_counts(&self.options, capacity);
        let grants = &mut admission.device;
        for layer in &mut self.layers {
            let packed_bytes = offloadable * shape.packed_page_bytes();
            if self.options.mode.low_bit() && layer.packed.len() < packed_bytes {
                let mut grown = grants.device(packed_bytes, "packed KV pages")?;
                grown.copy(0, &layer.packed, 0..layer.packed.len());
                layer.packed = grown;
            }
            if let Some(host) = layer.host.as_mut().filter(|host| host.room() < offloadable) {
                *host = Arc::new(HostLayer::new(&self.host.slab, offloadable, host.pages().cloned()));
            }
            if self.options.mode.fetches() {
                let top_k = slots_per_head(&self.options, offloadable);
                layer.prefetch.reserve(grants, &shape, top_k, offloadable)?;
            }
        }
        self.top_up_spare(tail * shape.n_layers, grants)?;
        for load in &mut self.loads {
            let pages = load.pages.get_mut();
            while pages.len() < offloadable {
                pages.push(Arc::new(grants.device(shape.wide_page_bytes(), "layers that come back")?));
            }
            if grants.is_gpu() {
                load.addresses = pages.iter().map(|page| page.address()).collect();
            }
        }
        if let Some(gpu) = device.gpu() {
            self.tables = Some(Tables::new(gpu, grants, shape.n_layers, list_room(capacity))?);
        }
        let total = host_pages(&shape, &self.options, capacity);
        self.host.promised.take_from(&mut admission.host, total - self.host.total);
        self.host.total = total;
        self.capacity = capacity;
        Ok(())
    }

    /// Bytes that this cache holds now.
    pub fn bytes(&self) -> CacheBytes {
        let wide = |n: usize| n as u64 * wide_page_bytes(&self.shape);
        let (offloadable, _) = page_counts(&self.options, self.capacity);
        CacheBytes {
            packed: self.layers.iter().map(|l| l.packed.metered_bytes()).sum(),
            wide: wide(self.wide_pages()),
            slots: self.layers.iter().map(|l| l.prefetch.metered_bytes()).sum(),
            loads: wide(self.loads.len() * offloadable),
            host: wide(self.host.total),
        }
    }

    fn wide_pages(&self) -> usize {
        self.spare.len() + self.layers.iter().map(|l| l.tail.len()).sum::<usize>()
    }

    /// Makes sure that spare and tail pages together are at least `total`.
    fn top_up_spare(&mut self, total: usize, grants: &mut Grants) -> Result<()> {
        for _ in self.wide_pages()..total {
            let page = grants.device(self.shape.wide_page_bytes(), "wide KV pages")?;
            self.spare.push_front(Spare { page: Arc::new(page), free_after: None });
        }
        Ok(())
    }

    /// Takes a page that nobody else reads any more, waiting for the copy stream if it must.
    fn take_spare(&mut self) -> WidePage {
        let Spare { page, free_after } = self.spare.pop_front().expect("pages were reserved for this many tokens");
        if let Some(event) = free_after {
            self.waited += self.device.wait(event, "a device page is paged out before it is used again");
        }
        page
    }

    /// Sees to it that every layer has the pages that the pairs of the next `n_rows` positions go to.
    pub fn begin_rows(&mut self, n_rows: usize) {
        let wanted = (self.counters.n + n_rows).div_ceil(PAGE) - self.counters.nq / PAGE;
        for layer in 0..self.layers.len() {
            while self.layers[layer].tail.len() < wanted {
                let fresh = self.take_spare();
                self.layers[layer].tail.push(fresh);
                self.tables.iter_mut().for_each(Tables::outdate);
            }
        }
    }

    /// The pages that the pairs of the next `n_rows` positions go to, as an operation that writes them.
    pub(crate) fn declare_rows(&self, layer: usize, n_rows: usize, uses: &mut Uses) {
        let page = |position: usize| position / PAGE - self.counters.nq / PAGE;
        let pages = &self.layers[layer].tail[page(self.counters.n)..=page(self.counters.n + n_rows - 1)];
        uses.writes.extend(pages.iter().map(|page| Resource::DevicePage(page.id())));
    }

    /// Slots of a KV head.
    pub(crate) fn top_k(&self) -> usize {
        top_k(&self.options, self.capacity)
    }

    /// Rounds K and V of one row to 16 bits and writes them at `position` of `layer`, on the CPU device. The counters do not
    /// move: a speculative row's pair lies one position behind the real one's and is overwritten in the next step.
    ///
    /// `k`, `v`: `[n_kv_heads, head_dim]`, K after RoPE.
    pub fn write(&mut self, layer: usize, position: usize, k: &[f32], v: &[f32]) {
        let page = position / PAGE - self.counters.nq / PAGE;
        let page = Arc::get_mut(&mut self.layers[layer].tail[page]).expect("an incomplete page has one owner");
        let _append = self.device.operation("append", |uses| uses.writes.push(Resource::DevicePage(page.id())));
        ops::kv::write_pairs(&self.device, &self.shape, page.bytes_mut(), position % PAGE, k, v);
    }

    /// The end of a decode step: the counters move, and a page that counts as offloaded from now on is packed and sent
    /// to the host in every layer. Returns the bytes sent.
    pub fn advance(&mut self) -> u64 {
        let before = self.counters;
        let offloaded = self.counters.advance();
        if offloaded.is_some() || self.counters.nq > before.nq {
            self.tables.iter_mut().for_each(Tables::outdate);
        }
        if self.counters.nq > before.nq {
            for layer in &mut self.layers {
                let page = layer.tail.remove(0);
                self.spare.push_back(Spare { page, free_after: self.host.paged_out });
            }
        }
        let Some(page) = offloaded else { return 0 };
        let in_tail = page - self.counters.nq / PAGE;
        for l in 0..self.layers.len() {
            let wide = self.layers[l].tail[in_tail].clone();
            self.pack_and_stage(l, page, std::slice::from_ref(&wide));
        }
        let sent = self.page_out(0..self.layers.len(), page);
        let _told_by_the_next_step = self.check_device(); // the pass itself was sound
        sent
    }

    /// Packs complete wide pages, beginning with page `first`, and gives them to the next page-out.
    fn pack_and_stage(&mut self, layer: usize, first: usize, pages: &[WidePage]) {
        let list = self.tables.as_ref().map(|tables| tables.address(layer, List::Wide) + first as u64 * 8);
        let layer = &mut self.layers[layer];
        if self.options.mode.low_bit() {
            ops::pack::pack_pages(&self.device, &self.shape, pages, first, &mut layer.packed, list);
        }
        let Some(table) = &layer.host else { return };
        let HostPages { promised, spare, page_out, .. } = &mut self.host;
        for (i, page) in pages.iter().enumerate() {
            let fresh = || promised.alloc().try_into_unique().expect("a new lease is the only one");
            page_out.add(page.clone(), spare.pop().unwrap_or_else(fresh), table, first + i);
        }
    }

    /// Sends to the host what was staged for it: pages of these layers, from page `first` on. Returns the bytes sent.
    fn page_out(&mut self, layers: Range<usize>, first: usize) -> u64 {
        if !self.options.mode.on_host() {
            return 0;
        }
        let (event, bytes) = self.host.page_out.launch(&self.device);
        self.host.paged_out = Some(event);
        self.layers[layers].iter_mut().for_each(|layer| layer.completion.sent(first, event));
        bytes
    }

    /// Wide pages of a prefill up to `n` tokens: those of a cache with room for `capacity`, and those that two layers need
    /// while they are computed (one is written while the copy stream still reads the other), and what is kept of the
    /// tails.
    fn prefill_wide_pages(&self, n: usize, capacity: usize) -> usize {
        self.layers.len() * (page_counts(&self.options, capacity).1 + self.packed_tail_pages(n))
            + prefill_pages(&self.options, n)
    }

    /// Pages of a layer's tail that a prefill up to `n` tokens packs, and keeps until it is over.
    fn packed_tail_pages(&self, n: usize) -> usize {
        let Counters { n: has, nq, .. } = self.counters;
        if n <= has { 0 } else { (self.counters.offloaded_after_prefill(n) / PAGE).min(has.div_ceil(PAGE)) - nq / PAGE }
    }

    /// Bytes on the device and pages on the host, beyond those held now, that room for `capacity` tokens takes, and the
    /// prefill of a context of `prefill` tokens beside it.
    fn needs(&self, capacity: usize, prefill: usize) -> (u64, usize) {
        let capacity = capacity.max(self.capacity);
        let (held, plan) = (self.bytes(), CacheBytes::plan(&self.shape, &self.options, capacity));
        let wide = wide_page_bytes(&self.shape).saturating_mul(self.prefill_wide_pages(prefill, capacity) as u64);
        // What grows exists twice for a moment, a layer at a time.
        let layers = self.layers.len() as u64;
        let moving = |new: u64, old: u64| if new > old { old / layers } else { 0 };
        let moving = moving(plan.packed, held.packed) + moving(plan.slots, held.slots);
        let device = CacheBytes { wide: wide.max(held.wide), ..plan }.device().saturating_add(moving);
        let host = host_pages(&self.shape, &self.options, capacity) - self.host.total;
        (device.saturating_sub(held.device()), host)
    }

    /// Bytes on the device and pages on the host that [`Cache::begin_prefill`] takes beyond those held now.
    pub fn prefill_needs(&self, n: usize) -> (u64, usize) {
        self.needs(n, n)
    }

    /// The slab of its host pages.
    pub fn slab(&self) -> &Slab {
        &self.host.slab
    }

    /// Starts the prefill of more tokens, up to `n` in all: makes room, and takes working pages.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] as [`Cache::reserve`]; if [`Cache::prefill_needs`] was granted, only where the
    /// system has no memory. [`Cache::free_working_pages`] gives back what is not room then.
    pub fn begin_prefill(&mut self, n: usize, admission: &mut Admission) -> Result<()> {
        self.settle_copies_in("prefetched pairs are here before a prompt", "loaded pages are here before a prompt");
        self.grow(n, admission)?;
        self.top_up_spare(self.prefill_wide_pages(n, self.capacity), &mut admission.device)
    }

    /// When the first `n_pages` host pages of a layer are complete.
    fn complete(&self, layer: usize, n_pages: usize) -> Option<Event> {
        n_pages.checked_sub(1).and_then(|last| self.layers[layer].completion.of(last))
    }

    /// Brings host pages of a layer back into device pages, and waits for them.
    fn load(&mut self, layer: usize, from: Range<usize>) -> Vec<WidePage> {
        let pages = from.clone().map(|_| self.take_spare()).collect();
        let Some(host) = self.layers[layer].host.clone() else { return pages };
        let mut pages = InFlight::new(pages);
        let _layer = self.device.for_layer(layer);
        let complete = self.complete(layer, from.end);
        PageIn::new(&self.device).launch(&self.device, &host, from, &mut pages, complete);
        let arrived = pages.arrive(&self.device, Some(LOADED), &mut Duration::default());
        self.note(arrived);
        pages.into_inner()
    }

    /// The device pages of one layer for a prefill up to `n` tokens: all that the new tokens must see at 16 bits and all
    /// that they will fill. In modes with a host copy they begin at position 0 and the offloaded ones come back from
    /// there; in `kivi` they begin at `nq`. Give them back with [`Cache::settle_prefill`].
    pub fn prefill_pages(&mut self, layer: usize, n: usize) -> Vec<WidePage> {
        let loaded = if self.options.mode.on_host() { self.counters.nq / PAGE } else { 0 };
        let mut pages = if loaded > 0 { self.load(layer, 0..loaded) } else { Vec::new() };
        pages.append(&mut self.layers[layer].tail);
        let wanted = n.div_ceil(PAGE) - self.prefill_first_page();
        // A page that only a speculative row had begun.
        let begun = pages.drain(wanted.min(pages.len())..);
        self.spare.extend(begun.map(|page| Spare { page, free_after: None }));
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
        let mut sent = 0;
        if new > old {
            self.pack_and_stage(layer, old, &pages[old - first..]);
            sent = self.page_out(layer..layer + 1, old);
        }
        let tail = self.counters.nq / PAGE - first;
        let packed_tail = tail..tail + self.packed_tail_pages(n);
        self.packed_tail[layer].extend(pages.drain(packed_tail));
        self.add_spare(pages);
        sent
    }

    /// These pages are not in use any more, but the copy stream may still read them.
    fn add_spare(&mut self, pages: Vec<WidePage>) {
        let free_after = self.host.paged_out;
        self.spare.extend(pages.into_iter().map(|page| Spare { page, free_after }));
    }

    /// A prefill up to `n` tokens is given up: the cache is as before it. Its first `settled` layers were settled;
    /// `pages` are those of the layer that was being computed, if one was.
    ///
    /// What it has written lies behind the counters and means nothing to anybody: the places of the tail behind token
    /// `n`, and packed pages. It has put new pages into the tables of the host, which leave them, and has taken pages
    /// from the tails, which come back.
    pub fn undo_prefill(&mut self, n: usize, settled: usize, pages: Option<Vec<WidePage>>) {
        self.come_to_rest();
        let Counters { n: has, no, nq, .. } = self.counters;
        let (tail_pages, packed) = (has.div_ceil(PAGE) - nq / PAGE, self.packed_tail_pages(n));
        for l in 0..settled {
            let mut rest = std::mem::take(&mut self.layers[l].tail);
            self.layers[l].tail = std::mem::take(&mut self.packed_tail[l]);
            self.layers[l].tail.extend(rest.drain(..tail_pages - packed));
            self.add_spare(rest);
            self.truncate_table(l, no / PAGE);
        }
        if let Some(mut pages) = pages {
            let first = nq / PAGE - self.prefill_first_page();
            self.layers[settled].tail = pages.drain(first..first + tail_pages).collect();
            self.add_spare(pages);
        }
        self.free_working_pages();
    }

    /// The end of a prefill that brought the cache to `n` tokens: counters, and no selection is valid any more. Pages
    /// that only the prefill needed are freed.
    pub fn end_prefill(&mut self, n: usize) {
        self.gather_failure = None; // a GPU forgets its pairs
        self.counters.after_prefill(n);
        for l in 0..self.layers.len() {
            self.layers[l].prefetch.slots_mut().clear(false);
            let packed = std::mem::take(&mut self.packed_tail[l]);
            self.add_spare(packed);
        }
        self.free_working_pages();
    }

    /// Frees the pages that only a prefill needs.
    pub fn free_working_pages(&mut self) {
        let keep = self.prefill_wide_pages(0, self.capacity);
        while self.wide_pages() > keep && self.spare.pop_front().is_some() {}
    }

    /// Time that writes have waited for pages since the last call.
    pub fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// `offload`: begins to bring `layer` back for this step, unless the step before has. Returns the bytes that this moves.
    pub fn begin_load(&mut self, layer: usize) -> u64 {
        let n_pages = self.counters.nq / PAGE;
        if !std::mem::take(&mut self.loads[layer % 2].is_ahead) {
            self.launch_load(layer, n_pages);
        }
        n_pages as u64 * self.shape.wide_page_bytes() as u64
    }

    /// `offload`: begins to bring `layer` back for the next step, which will read from the host what is offloaded now.
    pub fn begin_next_load(&mut self, layer: usize) {
        self.launch_load(layer, self.counters.no / PAGE);
        self.loads[layer % 2].is_ahead = true;
    }

    fn launch_load(&mut self, layer: usize, n_pages: usize) {
        let Some(host) = &self.layers[layer].host else { return };
        let _layer = self.device.for_layer(layer);
        let complete = self.complete(layer, n_pages);
        let Load { pages, job, .. } = &mut self.loads[layer % 2];
        job.launch(&self.device, host, 0..n_pages, pages, complete);
    }

    /// Waits for what `layer` reads of the host's: prefetched pairs, or its pages in `offload`. The time that this takes is
    /// added to `exposed`. `waited`: whether the caller has waited for all copies already.
    pub fn arrive(&mut self, layer: usize, waited: bool, exposed: &mut Duration) {
        let site = |site| if waited { None } else { Some(site) };
        let arrived = self.layers[layer].prefetch.arrive(&self.device, site(ARRIVAL), exposed);
        self.note(arrived);
        let n_loads = self.loads.len();
        if n_loads > 0 {
            let arrived = self.loads[layer % n_loads].pages.arrive(&self.device, site(LOADED), exposed);
            self.note(arrived);
        }
    }

    /// The slots of `layer`, the host pages that fill them, and when each of those is complete.
    ///
    /// # Panics
    /// In modes that do not fetch.
    pub fn fetching(&mut self, layer: usize) -> (&mut Prefetch, &Arc<HostLayer>, Completion) {
        let LayerCache { prefetch, host, completion, .. } = &mut self.layers[layer];
        (prefetch, host.as_ref().expect("a mode that fetches has a host copy"), *completion)
    }

    /// The host's pages of a layer.
    ///
    /// # Panics
    /// In modes without a copy on the host.
    pub(crate) fn host(&self, layer: usize) -> &Arc<HostLayer> {
        self.layers[layer].host.as_ref().expect("a mode with a host copy")
    }

    /// On a GPU: brings the lists of pages up to date, if they are not.
    pub(crate) fn refresh_tables(&mut self) {
        let Some(tables) = self.tables.as_mut().filter(|tables| tables.is_outdated()) else { return };
        let split = self.counters.nq / PAGE;
        for (l, layer) in self.layers.iter().enumerate() {
            let wide = tables.list_mut(l, List::Wide);
            wide.fill(0);
            if let Some(load) = self.loads.get(l % 2) {
                wide[..split].copy_from_slice(&load.addresses[..split]);
            }
            wide[split..].iter_mut().zip(&layer.tail).for_each(|(to, page)| *to = page.address());
            let host = tables.list_mut(l, List::Host);
            host.fill(0);
            let pages = layer.host.iter().flat_map(|table| table.pages());
            host.iter_mut().zip(pages).for_each(|(to, page)| *to = page.bytes().as_ptr() as u64);
        }
        // Those of the pass before may still be under way: a layer waits for its own later.
        let gathered = self.device.record(StreamId::CopyIn);
        self.device.after(StreamId::Compute, gathered, "gathers have read the lists of pages before they change");
        tables.send();
    }

    /// On a GPU: the kernels are to find these pages in `layer`, from page number `first` on.
    pub(crate) fn list_pages(&mut self, layer: usize, first: usize, pages: &[WidePage]) {
        let Some(tables) = &mut self.tables else { return };
        let list = tables.list_mut(layer, List::Wide);
        list[first..].iter_mut().zip(pages).for_each(|(to, page)| *to = page.address());
        tables.send_list(layer, List::Wide);
        tables.outdate();
    }

    /// On a GPU: where everything of `layer` lies.
    ///
    /// # Panics
    /// On the CPU device.
    pub(crate) fn places(&self, layer: usize) -> specache_layer_cache {
        let tables = self.tables.as_ref().expect("a cache on a GPU has lists");
        let slots = self.layers[layer].prefetch.places();
        specache_layer_cache {
            packed: self.layers[layer].packed.address(),
            wide: tables.address(layer, List::Wide),
            host: tables.address(layer, List::Host),
            slots: slots.map_or(0, |s| s.table),
            pairs: slots.map_or(0, |s| s.pairs),
            skip: slots.map_or(0, |s| s.skip),
            skip_stride: slots.map_or(0, |s| s.skip_stride as u32),
            reserved: [0; 3],
        }
    }

    /// What attention reads of `layer`.
    pub fn view(&self, layer: usize, window: Option<usize>) -> KvView<'_> {
        let cache = &self.layers[layer];
        let far = match self.options.mode {
            KvMode::Full => Far::None,
            KvMode::Offload => Far::Wide(self.loads[layer % 2].pages.get()),
            KvMode::Kivi | KvMode::Fetch | KvMode::SpeCache => Far::Packed(&cache.packed),
        };
        let slots = self.options.mode.fetches().then(|| cache.prefetch.slots());
        let replaced = slots.map(|s| Replaced {
            count: s.count,
            stride: s.top_k,
            positions: &s.positions,
            slot_of: &s.slot_of,
            pairs: &s.pairs,
        });
        KvView { shape: self.shape, split: self.counters.nq, far, tail: &cache.tail, replaced, window }
    }
}
